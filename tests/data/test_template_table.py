"""docs/templates.md says what Graft does with each chat template: the table is what the code does, without a wrong cell."""

import pytest

from tests.helpers.places import ROOT
from tests.helpers.template_table import HEAD, table

pytestmark = pytest.mark.heavy


def test_table_of_chat_templates_is_what_the_code_does_and_no_cell_is_wrong():
    rows = table()
    page = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    first = page.index(HEAD)
    assert page[first:].split("\n\n")[0].splitlines() == rows
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert len(cells) > 70
    for name, mask, score, thought, _, tools, system in cells:
        if mask.startswith("refused: "):
            continue
        assert (mask, score) == ("yes", "100"), name
        assert thought in ("refused", "learnt; the answer scores 100"), name
        assert tools in ("refused", "learnt"), name
        assert system in ("yes", "in the user's text"), name
