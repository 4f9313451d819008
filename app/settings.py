"""Every knob of the server: `DERMLENS_<NAME>` in the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.engines.base import DecoderName, EngineName, Precision


class Settings(BaseSettings):
    """docs/settings.md lists these; tests/test_docs.py holds it to that."""

    model_config = SettingsConfigDict(env_prefix="DERMLENS_", frozen=True, protected_namespaces=())

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port.")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="What uvicorn logs; image bytes and file names are never logged."
    )
    model_store: Path = Field(Path("model_store"), description="Folder of the published models.")
    model_name: str = Field("asff-resnet50", description="Model to serve.")
    model_version: str = Field("current", description="Version to serve, or `current`.")
    operating_point: str = Field("balanced", description="Operating point for decisions, from the manifest.")
    coverage: Literal["off", "0.90", "0.95"] = Field(
        "0.95", description="Coverage of the abstention rule, where the version has one; `off` never refers."
    )
    engine: EngineName = Field("auto", description="`auto` takes CUDA where there is one, else OpenVINO on the CPU.")
    precision: Literal["auto"] | Precision = Field(
        "auto",
        description="Of OpenVINO; `auto` takes bfloat16 where the processor has it, else int8 if the version does.",
    )
    cpu_threads: int = Field(0, ge=0, description="CPU threads of a forward pass; 0 for every core.")
    decoder: DecoderName = Field("pillow", description="`nvjpeg` decodes the JPEGs of /predict on the GPU.")
    decode_threads: int = Field(4, ge=1, description="Images decoded or drawn at once.")
    max_batch: int = Field(0, ge=0, description="Images per forward pass; 0 for 32 on CUDA and 8 on the CPU.")
    max_wait_ms: float = Field(0, ge=0, description="How long an idle device waits for a fuller batch, milliseconds.")
    max_queue: int = Field(256, ge=1, description="Images waiting at most; beyond it the answer is 503.")
    timeout_ms: int = Field(30_000, ge=1, description="Time from upload to result before 504, milliseconds.")
    max_upload_bytes: int = Field(20_000_000, ge=1, description="Largest image file, bytes.")
    max_pixels: int = Field(64_000_000, ge=1, description="Largest width × height of an image, pixels.")
    max_batch_files: int = Field(32, ge=1, description="Files in one /predict/batch request at most.")
