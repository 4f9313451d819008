"""Images for schemathesis to send where the description asks for bytes."""

import base64
import io
from typing import Any

import schemathesis
from hypothesis import strategies as st

from training.drawn import draw_lesion

buffer = io.BytesIO()
draw_lesion(1, 1, size=(40, 32)).save(buffer, "PNG")
schemathesis.openapi.format("binary", st.just(buffer.getvalue()))
schemathesis.openapi.format("byte", st.just(base64.b64encode(buffer.getvalue()).decode()))


@schemathesis.hook
def filter_case(_: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """It holds that a header which the description does not name must be refused; HTTP lets every one be sent."""
    return "x-schemathesis-unknown-property" not in (case.headers or {})


@schemathesis.hook
def map_body(_: schemathesis.HookContext, body: Any) -> Any:
    """A tensor's shape names the number of its elements, which a schema cannot say."""
    for tensor in body.get("inputs", []) if isinstance(body, dict) and isinstance(body.get("inputs"), list) else []:
        data, shape = (tensor.get("data"), tensor.get("shape")) if isinstance(tensor, dict) else (None, None)
        if isinstance(data, list) and data and isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int:
            tensor["shape"] = [len(data)] if shape[0] > 0 else shape
    return body
