"""Plain FastAPI and its thread pool, as the tutorials have it; /explain with captum's hooks on the shared model."""

import io
import os
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, File, Response
from lesion import ROOT, load
from PIL import Image

app = FastAPI()
decode, run = load()


@app.post("/predict")
def predict(file: Annotated[bytes, File()]) -> dict[str, float]:
    return {"malignant": run([decode(file)])[0]}


def _explainer() -> None:
    from captum.attr import LayerAttribution, LayerGradCam

    from app.model import store
    from app.model.architecture import from_version

    version = store.load(ROOT / "model_store", "asff-resnet50", store.current(ROOT / "model_store", "asff-resnet50"))
    model = from_version(version.manifest, version.weights)
    grad_cam = LayerGradCam(lambda x: model(x).logits, model.fusion)

    @app.post("/explain")
    def explain(file: Annotated[bytes, File()]) -> Response:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        pixels = decode(file)[None].float().requires_grad_()
        cam = grad_cam.attribute(pixels, target=1, relu_attributions=True)
        cam = LayerAttribution.interpolate(cam, (image.height, image.width), "bilinear")[0, 0].detach().numpy()
        heat = (cam / (cam.max() or 1) * 255).astype(np.uint8)
        overlay = Image.blend(image, Image.merge("RGB", [Image.fromarray(heat)] * 3), 0.4)
        buffer = io.BytesIO()
        overlay.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")


if __name__ == "__main__":
    if os.environ.get("PEER_ENGINE", "torch") == "torch":
        _explainer()
    uvicorn.run(app, port=int(os.environ["PORT"]), log_level="warning")
