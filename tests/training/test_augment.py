import pytest
import torch

from training.augment import UNIFORMS, augment, mixup
from training.config import Augmentation
from training.corruptions import jpeg

OFF = dict.fromkeys(Augmentation.model_fields, 0.0)


def strength(**on: float) -> Augmentation:
    return Augmentation(**(OFF | on))


def images(batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def middle(batch: int = 1, **changed: float) -> torch.Tensor:
    """Uniforms that change nothing (no flip, centre of every range) but where told."""
    uniforms = torch.full((batch, UNIFORMS), 0.5)
    for column, value in changed.items():
        uniforms[:, int(column[1:])] = value
    return uniforms


def test_the_middle_of_every_range_is_the_image() -> None:
    full = Augmentation(
        rotation=90, scale=0.3, shift=0.2, shear=0.2, brightness=0.5, contrast=0.5, saturation=0.5, hue=20, erase=0
    )
    assert torch.allclose(augment(images(), middle(), size=32, strength=full), images().float(), atol=1e-2)


def test_flip_turn_and_shift_move_pixels_where_they_should() -> None:
    x = images().float()
    assert torch.allclose(augment(images(), middle(u0=0.1), size=32, strength=strength()), x.flip(3), atol=1e-2)
    turned = augment(images(), middle(u1=1.0), size=32, strength=strength(rotation=90))
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-1) or torch.allclose(
        turned, x.rot90(-1, (2, 3)), atol=1e-1
    )
    shifted = augment(images(), middle(u5=1.0), size=32, strength=strength(shift=0.25))
    assert torch.allclose(shifted[..., :24], x[..., 8:], atol=1e-2)


def test_scale_zooms_about_the_centre() -> None:
    ramp = torch.arange(32, dtype=torch.float32).repeat(1, 3, 32, 1)
    zoomed = augment(ramp, middle(u2=0.0), size=32, strength=strength(scale=0.5))
    slope = (zoomed[0, 0, 16, 20] - zoomed[0, 0, 16, 12]) / 8
    assert slope.item() == pytest.approx(0.6065, abs=0.01)  # exp(−0.5): a smaller window, drawn larger


def test_colour_changes_do_what_their_names_say() -> None:
    x = images().float()
    brighter = augment(images(), middle(u7=1.0), size=32, strength=strength(brightness=0.2))
    assert torch.allclose(brighter, (x * 1.2).clamp(max=255), atol=1e-2)
    grey = augment(images(), middle(u9=0.0), size=32, strength=strength(saturation=0.999))
    assert float((grey.amax(1) - grey.amin(1)).mean()) < 1
    assert torch.allclose(grey.mean(1), x.mean(1), atol=0.5)
    flat = augment(images(), middle(u8=0.0), size=32, strength=strength(contrast=0.999))
    assert float(flat.std()) < 1
    turned = augment(images(), middle(u10=1.0), size=32, strength=strength(hue=120))
    cycled = torch.allclose(turned, x[:, [1, 2, 0]], atol=1) or torch.allclose(turned, x[:, [2, 0, 1]], atol=1)
    assert cycled  # a third of a turn about the grey axis permutes the channels


def test_erase_fills_one_box() -> None:
    out = augment(images(), middle(u13=1.0), size=32, strength=strength(erase=0.5))
    changed = ((out - images().float()).abs().sum(dim=1) > 0.1)[0]
    assert bool(changed[8:24, 8:24].float().mean() > 0.95)
    assert not changed[:8].any()


def test_tint_gains_one_channel_and_blur_smooths() -> None:
    x = images().float()
    redder = augment(images(), middle(u17=1.0), size=32, strength=strength(tint=0.2))
    assert torch.allclose(redder[:, 0], (x[:, 0] * 1.2).clamp(max=255), atol=1e-2)
    assert torch.allclose(redder[:, 1:], x[:, 1:], atol=1e-2)
    soft = augment(images(), middle(u14=1.0), size=32, strength=strength(blur=0.9))
    assert float(soft.std()) < 0.5 * float(x.std())


def test_hairs_come_with_their_probability_and_from_the_image_alone() -> None:
    grey = torch.full((4, 3, 64, 64), 200, dtype=torch.uint8)
    uniforms = middle(4, u16=0.3)
    uniforms[:, 15] = torch.tensor([0.0, 0.1, 0.3, 0.9])
    out = augment(grey, uniforms, size=64, strength=strength(hairs=0.2))
    covered = (out < 150).float().mean(dim=(1, 2, 3))
    assert (covered[:2] > 0.01).all()
    assert (covered[2:] == 0).all()
    assert torch.equal(out[1], augment(grey[:1], uniforms[1:2], size=64, strength=strength(hairs=0.2))[0])


def test_noise_is_as_strong_as_it_says_on_half_of_the_images_and_from_the_image_alone() -> None:
    grey = torch.full((3, 3, 64, 64), 128, dtype=torch.uint8)
    uniforms = middle(3)
    uniforms[:, 20] = torch.tensor([0.4, 0.75, 1.0])
    uniforms[:, 21] = torch.tensor([0.1, 0.2, 0.3])
    out = augment(grey, uniforms, size=64, strength=strength(noise=0.1))
    assert torch.allclose(out[0], grey[0].float(), atol=1e-2)
    assert out[1].std().item() == pytest.approx(12.75, rel=0.02)
    assert out[2].std().item() == pytest.approx(25.5, rel=0.02)
    assert out.mean().item() == pytest.approx(128, abs=0.5)
    assert torch.equal(out[2], augment(grey[:1], uniforms[2:], size=64, strength=strength(noise=0.1))[0])


def test_jpeg_compresses_half_of_the_images_down_to_a_quality() -> None:
    x = images(3)
    uniforms = middle(3)
    uniforms[:, 22] = torch.tensor([0.4, 0.75, 1.0])
    out = augment(x, uniforms, size=32, strength=strength(jpeg=0.8))
    assert torch.allclose(out[0], x[0].float(), atol=1e-2)
    for row, quality in ((1, 60), (2, 20)):
        assert torch.equal(out[row], torch.from_numpy(jpeg(x[row].numpy(), quality=quality)).float())


def test_mixup_mixes_labels_as_it_mixes_images() -> None:
    levels = torch.tensor([0.0, 100.0, 200.0])
    x = levels[:, None, None, None].expand(3, 3, 8, 8)
    mixed, targets = mixup(x, torch.eye(3), alpha=0.4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mixed[:, 0, 0, 0], targets @ levels, atol=1e-3)
    assert torch.allclose(targets.sum(1), torch.ones(3))
    assert (targets.diagonal() >= 0.5).all()


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    config = Augmentation(
        rotation=180, scale=0.2, shift=0.1, shear=0.1, brightness=0.2, contrast=0.2, saturation=0.2, hue=8, erase=0.4
    )
    uniforms = torch.rand(6, UNIFORMS, generator=torch.Generator().manual_seed(3))
    together = augment(images(6), uniforms, size=64, strength=config)
    alone = augment(images(6)[4:5], uniforms[4:5], size=64, strength=config)
    assert together.shape == (6, 3, 64, 64)
    assert torch.allclose(together[4:5], alone, atol=1e-3)
    assert float(together.min()) >= 0
    assert float(together.max()) <= 255
