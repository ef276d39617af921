import pytest

from sandbox.session.confirm import AlwaysYes, NobodyThere, Question, escape_for_display

QUESTION = Question("a1", "run_command", "git push", "because", "0" * 64)


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
    assert escape_for_display(text) == shown


async def test_without_a_terminal_the_answer_is_no() -> None:
    answer = await NobodyThere().ask(QUESTION)
    assert (answer.is_approved, answer.by) == (False, "no_terminal")


async def test_the_yes_flag_is_named_as_the_one_who_answered() -> None:
    answer = await AlwaysYes().ask(QUESTION)
    assert (answer.is_approved, answer.by) == (True, "yes_flag")
