"""Some damaged recipes and data files; `python -m tests.faults.fuzz` runs as many as one likes."""

from pathlib import Path

import pytest

from tests.faults import fuzz, templates

pytestmark = pytest.mark.heavy


@pytest.mark.slow
def test_damaged_recipes_and_data_are_taken_or_refused_and_touch_nothing(tmp_path: Path):
    counts, failures = fuzz.fuzz(160, 1, tmp_path / "fuzz")
    assert not failures, "\n".join(failures[:3])
    for kind in ("recipe", "data"):
        for outcome in ("accepted", "refused"):
            assert counts[f"{kind}: {outcome}"] > 3, counts


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda *_: 1 / 0, "traceback"),
        (lambda *_: Path("../../planted").write_text(""), "outside"),
        (lambda *_: __import__("time").sleep(9), "hang"),
        (lambda *_: __import__("subprocess").run(["true"]), "outside"),
    ],
)
def test_fuzzer_sees_planted_faults(fault, name, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fuzz, "run_case", fault)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    counts, failures = fuzz.fuzz(2, 0, tmp_path / "outer" / "fuzz")
    assert set(counts) == {f"recipe: {name}", f"data: {name}"}
    assert len(failures) == 2


def test_damaged_templates_render_or_are_refused_within_the_limits(tmp_path: Path):
    counts, failures, _ = templates.fuzz(80, 1, tmp_path / "templates", seconds=0.2)
    assert not failures, "\n".join(failures[:3])
    for outcome in ("rendered", "refused", "over the limits"):
        assert counts[outcome] > 3, counts
