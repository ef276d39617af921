from sandbox.session.confirm import AlwaysYes, NobodyThere, Question

QUESTION = Question("a1", "run_command", "git push", "because", "0" * 64)


async def test_without_a_terminal_the_answer_is_no() -> None:
    answer = await NobodyThere().ask(QUESTION)
    assert (answer.is_approved, answer.by) == (False, "no_terminal")


async def test_the_yes_flag_is_named_as_the_one_who_answered() -> None:
    answer = await AlwaysYes().ask(QUESTION)
    assert (answer.is_approved, answer.by) == (True, "yes_flag")
