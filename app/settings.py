"""Every knob of the server: `DERMLENS_<NAME>` in the environment.

python -m app.settings    # the table of docs/settings.md, written there by `make docs`
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.engines.base import DecoderName, EngineName, Precision

PREFIX = "DERMLENS_"
ELSEWHERE = {"DERMLENS_DATA_DIR", "DERMLENS_PUBLISH", "DERMLENS_CPUS"}  # read by training and by docker-compose.yml


class Settings(BaseSettings):
    """docs/settings.md lists these; tests/test_docs.py holds it to that."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, protected_namespaces=())

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port.")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="Least level of what is logged; nothing of an upload ever is."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Form of the logs; `auto` is text on a terminal, else JSON."
    )
    tracing: bool = Field(
        False, description="Whether requests are traced; OTEL_EXPORTER_OTLP_ENDPOINT says where the spans go."
    )
    audit_log: Path | None = Field(None, description="File of the audit log, one record a prediction; none without it.")
    audit_key_file: Path | None = Field(
        None, description="File of 32 random bytes or more, the audit log's secret; needed with an audit log."
    )
    model_store: Path = Field(Path("model_store"), description="Folder of the published models.")
    model_name: str = Field("asff-resnet50", description="Model to serve.")
    model_version: str = Field("current", description="Version to serve, or `current`.")
    reload_ms: float = Field(
        2_000, ge=0, description="How often the store is looked at for another current version; 0 never."
    )
    shadow_version: str | None = Field(
        None, description="Version that scores what was answered too, to be compared in the metrics; none without it."
    )
    shadow_share: float = Field(1, ge=0, le=1, description="Share of the answered images that it scores.")
    api_keys: Path | None = Field(
        None, description="TOML file of API keys, made by `dermlens keys new`; without one everybody may call."
    )
    cors_origins: str = Field("", description="Origins whose pages may call, with commas between; none by default.")
    docs: bool = Field(True, description="Whether /docs and /openapi.json are served.")
    page: bool = Field(True, description="Whether the web page is served, at /.")
    operating_point: str = Field("balanced", description="Operating point for decisions, from the manifest.")
    coverage: Literal["off", "0.90", "0.95"] = Field(
        "0.95", description="Coverage of the abstention rule, where the version has one; `off` forms no set."
    )
    engine: EngineName = Field("auto", description="`auto` takes CUDA where there is one, else OpenVINO on the CPU.")
    precision: Literal["auto"] | Precision = Field(
        "auto",
        description="Of OpenVINO; `auto` takes bfloat16 where the processor has it, else int8 if the version does.",
    )
    cpu_threads: int = Field(0, ge=0, description="CPU threads of a forward pass; 0 for every core.")
    decoder: DecoderName = Field("pillow", description="`nvjpeg` decodes the JPEGs of /predict on the GPU.")
    decode_isolation: Literal["thread", "process"] = Field(
        "thread", description="`process` decodes in processes of few rights that are killed when they overrun (Linux)."
    )
    decode_timeout_ms: int = Field(
        10_000, ge=1, description="Time for one image before its decode process is killed, milliseconds."
    )
    decode_memory_bytes: int = Field(
        1_500_000_000, ge=300_000_000, description="Address space of a decode process, bytes."
    )
    decode_threads: int = Field(
        0, ge=0, description="Images decoded or drawn at once; 0 for one a CPU thread, 2 to 16."
    )
    max_batch: int = Field(
        0, ge=0, description="Images per forward pass; 0 for 32 on CUDA and one a CPU thread, 2 to 8."
    )
    max_wait_ms: float = Field(0, ge=0, description="How long an idle device waits for a fuller batch, milliseconds.")
    max_queue: int = Field(256, ge=1, description="Images accepted and not yet answered; beyond it the answer is 503.")
    timeout_ms: int = Field(30_000, ge=1, description="Time from upload to result before 504, milliseconds.")
    stuck_ms: int = Field(
        120_000, ge=100, description="A forward pass that takes longer ends the process, for its supervisor to restart."
    )
    max_upload_bytes: int = Field(20_000_000, ge=1, description="Largest image file, bytes.")
    max_pixels: int = Field(
        64_000_000, ge=1, le=89_478_485, description="Largest width × height of an image, pixels; Pillow takes no more."
    )
    max_batch_bytes: int = Field(
        100_000_000, ge=1, description="Largest body of /predict/batch and of V2's infer, bytes."
    )
    read_timeout_ms: int = Field(30_000, ge=1, description="Time for a whole request body before 408, milliseconds.")
    max_batch_files: int = Field(32, ge=1, description="Images in one request at most.")

    @property
    def cores(self) -> int:
        """CPU threads that the server may use."""
        return self.cpu_threads or os.cpu_count() or 1

    @property
    def workers(self) -> int:
        """Images decoded or drawn at once: more than one a core only take turns with the forward passes."""
        return self.decode_threads or min(16, max(2, self.cores))


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + field.upper()


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A warning for each name in an environment that looks like a setting and is none."""
    known = [field.upper() for field in Settings.model_fields]
    strange = sorted({n for n in environment if n.startswith(PREFIX)} - {PREFIX + name for name in known} - ELSEWHERE)
    near = {name: difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1) for name in strange}
    return [f"{n} is no setting: {f'did you mean {PREFIX}{m[0]}?' if m else 'unset it'}" for n, m in near.items()]


def table() -> str:
    """Every setting as a row of Markdown."""
    fields = Settings.model_fields.items()
    rows = [f"| `{variable(name)}` | `{field.default}` | {field.description} |" for name, field in fields]
    return "\n".join(["| variable | default | what it does |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
