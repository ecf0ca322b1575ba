"""What listings print."""

from __future__ import annotations


def test_cells_are_text_and_not_markup(capsys):
    from expunge.cli.common import print_table

    print_table("settings", ["range"], [["[0, 1]"], ["[bold]"]])
    assert "[0, 1]" in (shown := capsys.readouterr().out) and "[bold]" in shown
