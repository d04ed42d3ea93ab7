"""eval/ablations.py: the shipped protocols are valid, and variants are trained with what they say, once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from diff2to3.config import load_config
from diff2to3.flow.networks import build_network
from diff2to3.training.tasks.flow import FlowRunConfig
from diff2to3.training.tasks.vae import VaeRunConfig

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = sorted((ROOT / "eval" / "protocol").glob("ablations_*.yaml"))
SCHEMAS = {"train/flow.py": FlowRunConfig, "train/vae.py": VaeRunConfig}

#: Takes a configuration and key=value words as training programs do, and validates at once: score = twice "a".
PROGRAM = """
import json, pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[2:])
out = pathlib.Path(given["train.out"])
out.mkdir(parents=True, exist_ok=True)
if given.get("fail") == "true":
    sys.exit(3)
with open(out / "log.jsonl", "a") as log:
    log.write(json.dumps({"step": 5, "kind": "train", "s_per_step": 0.25}) + "\\n")
    scores = {"score": 2 * float(given["a"]), "words": sys.argv[2:]}
    log.write(json.dumps({"step": 5, "kind": "validate", **scores}) + "\\n")
"""


@pytest.fixture(scope="module")
def program(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    return load_source(ROOT / "eval" / "ablations.py")


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    values = {
        "program": str(tmp_path / "program.py"), "config": "none.yaml", "scores": ["score"],
        "common": {"a": 1, "list": [1, None]},
        "variants": {"as it is": {}, "more: of a": {"a": 3}},
    }  # fmt: skip
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda p: p.stem)
def test_every_variant_of_a_shipped_protocol_is_a_valid_configuration(
    path: Path, program: ModuleType
) -> None:
    protocol = load_config(program.Protocol, path)
    assert (ROOT / protocol.program).is_file() and len(protocol.variants) >= 3
    for name in protocol.variants:
        config = load_config(
            SCHEMAS[protocol.program], ROOT / protocol.config, program.words_of(protocol, name)
        )
        assert config.train.steps == protocol.common["train.steps"]
        if isinstance(config, FlowRunConfig):
            build_network(config.model)


def test_variants_run_with_their_changes_and_the_table_has_their_scores(
    protocol: Path, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "table.json"
    out.parent.mkdir()
    words = [str(protocol), "b=2", "--out", str(out), "--runs", str(tmp_path / "runs")]
    assert program.main(words) == 0
    result = json.loads(out.read_text())
    assert [(row["name"], row["score"], row["s_per_step"]) for row in result["variants"]] == [
        ("as it is", 2.0, 0.25), ("more: of a", 6.0, 0.25),
    ]  # fmt: skip
    table = out.with_suffix(".md").read_text()
    assert "| more: of a | 6 | 0.25 |" in table and table in capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "more-of-a" / "log.jsonl").read_text().splitlines()[-1])
    assert record["words"][:3] == ["a=3", "list=[1, null]", "b=2"]
    assert program.main([*words, "--only", "more"]) == 0
    assert [row["name"] for row in json.loads(out.read_text())["variants"]] == ["more: of a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "absent"], "no variant of"), (["fail=true"], "as it is: the run in .* failed")],
)
def test_what_goes_wrong_is_named(
    words: list[str],
    message: str,
    protocol: Path,
    program: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program.main([str(protocol), *words, "--runs", str(tmp_path / "runs")]) == 2
    assert re.search(message, capsys.readouterr().err)
