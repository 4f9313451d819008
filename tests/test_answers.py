"""The tool that renews the answers in the docs."""

import json
import re
from pathlib import Path

import pytest

from tests.answers import SHOWN, WIDTH, pages, renewed, served, wrapped

PAGE = """Before.

```
$ echo '{"b":1,"a":[2]}'
an answer of another day
$ printf 'localhost:8000' | cut -c1-9
```

```
dermlens serve    # is not run
```

The [card](../model_store/asff-resnet50/0/MODEL_CARD.md); `--init model_store/asff-resnet50/2` is history.
"""


def test_commands_are_run_and_the_rest_of_a_page_stays(tmp_path: Path) -> None:
    after = renewed(PAGE, port=9, folder=tmp_path)
    assert (
        after
        == f"""Before.

```
$ echo '{{"b":1,"a":[2]}}'
{{"b": 1, "a": [2]}}
$ printf 'localhost:8000' | cut -c1-9
localhost …
```

```
dermlens serve    # is not run
```

The [card](../model_store/asff-resnet50/{served()}/MODEL_CARD.md); `--init model_store/asff-resnet50/2` is history.
"""
    )
    assert renewed(after, port=9, folder=tmp_path) == after
    assert renewed("```\n$ printf localhost:8000\n```\n", port=9, folder=tmp_path).endswith("\nlocalhost:9\n```\n")


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cat absent \| cut -c1-9: exit code 1: cat: absent"):
        renewed("```\n$ cat absent | cut -c1-9\n```\n", port=9, folder=tmp_path)


def test_json_is_wrapped_at_spaces_and_other_lines_are_cut() -> None:
    answer = {f"key-{n}": ["a-long-word"] * n for n in range(9)}
    told = wrapped(json.dumps(answer))
    assert json.loads(told) == answer
    assert max(map(len, told.splitlines())) <= WIDTH
    assert wrapped("HTTP/1.1 200 OK\r\n\r\n" + "x" * (WIDTH + 1)).splitlines() == [
        "HTTP/1.1 200 OK",
        "",
        "x" * WIDTH,
        "x",
    ]


def test_the_docs_show_answers_of_the_bundled_version() -> None:
    """`make docs` renews them."""
    for page in pages():
        text = page.read_text()
        assert {link[0] for link in re.finditer(r"(?<=asff-resnet50/)\d+(?=/MODEL_CARD)", text)} <= {served()}, page
        for block in SHOWN.findall(text):
            named = re.findall(r'"version":\s*"(\d+)"|x-model-version: (\d+)|version="(\d+)"', block)
            assert {"".join(one) for one in named} <= {served()}, (page, block)
