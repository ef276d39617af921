import pytest

from sandbox.cli.display import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("git status", "git status"),
        ("größe ✓", "größe ✓"),
        ("echo safe\rrm -rf x", "echo safe\\rrm -rf x"),
        ("a\x1b[2Kb", "a\\x1b[2Kb"),
        ("two\nlines", "two\\nlines"),
        ("user\u202egnp.exe", "user\\u{202e}gnp.exe"),
        ("zero\u200bwidth", "zero\\u{200b}width"),
        ("no\u00a0break", "no\\u{a0}break"),
        ("lone \udc80", "lone \\u{dc80}"),
        ("del\x7f", "del\\x7f"),
    ],
)
def test_what_could_hide_part_of_a_line_is_shown_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
