"""From records to a page: verdicts, tables, figures, HTML, Markdown, JSON."""

from expunge.report.build import render_html, render_markdown, write_report
from expunge.report.table import terminal_table
from expunge.report.verdict import judge, row_verdict
from expunge.report.words import summary

__all__ = [
    "judge",
    "render_html",
    "render_markdown",
    "row_verdict",
    "summary",
    "terminal_table",
    "write_report",
]
