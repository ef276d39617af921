"""Every line here is a row of a table: what was written, and what must be decided about it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sandbox.policy.commands.line import decide_command
from sandbox.policy.model import ShellPolicy

SHELL = ShellPolicy(
    allowed_binaries=(
        "git", "make", "npm", "cargo", "python3", "find", "xargs", "sh", "bash", "ls", "cat", "grep", "tar",
        "wc", "busybox", "sort", "./gradlew", "ssh", "npx", "nproc", "sed", "head",
    ),
    blocked_commands=("rm", "sudo", "curl"),
)  # fmt: skip

ALLOWED = r"""
git status
git commit -m "fix: a thing" -m 'and more'
git -C sub log --oneline -n 5
git --no-pager diff HEAD~1 -- src/a.py
git -c user.name=x -c user.email=x@y commit -m m
git -c core.pager=cat log
git log --format='%h %s' | head -5
git config user.email a@b.c
git config --get remote.origin.url
git commit -m "rm is a word here"
git log --grep 'curl'
git bisect run make test
git submodule foreach 'git status'
git stash show stash@{0}
git diff "$BASE" ./src
/usr/bin/git status
/bin/ls -la
//usr//bin/git status
/usr/./bin/git status
make
make -j4 test
make -j$(nproc) test
make CFLAGS=-O2 V=1
make -C sub -f Makefile.dev all
npm ci
npm test -- --watch=false
npm run build
cargo test --release
cargo build -- --config
python3 -m pytest -q
python3 - <<'EOF'
ls *.py src/**/*.js
ls | wc -l
ls && git status || echo no
ls; git status & wait
(cd sub && ls)
{ ls; git status; }
! grep -q x y
time ls
if [ -f x ]; then ls; else git status; fi
for f in a b c; do cat "$f"; done
for f in *.py; do cat ./$f; done
while read -r line; do echo "$line"; done < names.txt
case $x in a) ls;; *) git status;; esac
X=1 Y=2 make
X=$(git rev-parse HEAD); echo "$X"
echo "$(git rev-parse HEAD)"
echo `git rev-parse HEAD`
cat <(git show HEAD:a) <(git show HEAD:b)
f() { git status; }; f
env FOO=bar git status
env -i FOO=bar ls
env
env -u FOO -- ls
timeout 5 git fetch
timeout -k 5 -s KILL 10s make
nice -n 10 make
nice -10 make
nohup make > out.log 2>&1
stdbuf -oL make
setsid make
command git status
command -v curl
exec git status
exec 2>err.log
builtin cd x
eval "git status; ls"
trap 'echo done' EXIT
trap - EXIT
sh -c 'git status && ls'
bash -ec "ls; git log"
bash -o pipefail -c 'ls | wc -l'
bash script.sh
sh -c 'git commit -m "$1"' _ message
xargs git add
git ls-files | xargs -n1 cat
git ls-files | xargs -I{} cat {}
find . -name '*.py'
find . -name '*.py' -exec grep x {} +
find . -type f -exec sh -c 'cat "$1"' _ {} \;
find ./src -name x -o -name y
busybox ls
./gradlew
echo hello > out.txt
cd src && ls
pwd
printf '%s\n' a b
test -f x && ls
[ -d y ] || ls
[[ -f x ]] && ls
true
:
export FOO=bar; make
set -euo pipefail; make
X=1
> empty.txt
PAGER=cat git log
GIT_PAGER=cat git log
GIT_AUTHOR_NAME=x git commit -m m
PYTHONPATH=. python3 -m pytest
grep '$(rm x)' file
grep "\$(rm x)" file
sed -n '1,5p' a.txt
cat a.txt # rm everything
echo $((1 + 2))
git commit -m 'line one
tar czf out.tgz src
tar -xf in.tar -C ./d
sort -u names | head -n 3
grep -rn "foo" ./src 2>/dev/null
ls -- -x
npx vitest
npm exec -- vitest
\g\i\t status
'git' status
"git" status
g'i't status
ls &> all.log
ls 2>&1 | cat
type git
umask 022
read -r x < f
for i in 1 2 3; do echo $((i * 2)); done
""".strip().splitlines()
ALLOWED = [
    {
        "python3 - <<'EOF'": "python3 - <<'EOF'\nprint('rm -rf $(x)')\nEOF",
        "git commit -m 'line one": "git commit -m 'line one\n\nline two; rm x'",
    }.get(line, line)
    for line in ALLOWED
] + ["ls \\\n  -la", "cat > f <<EOF\n$X and $(git status)\nEOF\n", "ls\ngit status\n", "\tls\t-a\n"]

DENIED = [
    # by name, wherever it stands
    ("rm -rf /", "shell.blocked_commands"),
    ("ls; rm x", "shell.blocked_commands"),
    ("ls && rm x", "shell.blocked_commands"),
    ("ls || rm x", "shell.blocked_commands"),
    ("ls | rm", "shell.blocked_commands"),
    ("ls & rm x", "shell.blocked_commands"),
    ("ls\nrm x", "shell.blocked_commands"),
    ("(rm x)", "shell.blocked_commands"),
    ("{ rm x; }", "shell.blocked_commands"),
    ("! rm x", "shell.blocked_commands"),
    ("time rm x", "shell.blocked_commands"),
    ("time -p rm x", "shell.blocked_commands"),
    ("coproc rm x", "shell.blocked_commands"),
    ("echo $(rm x)", "shell.blocked_commands"),
    ("echo `rm x`", "shell.blocked_commands"),
    ('echo "$(rm x)"', "shell.blocked_commands"),
    ('echo "a `rm x` b"', "shell.blocked_commands"),
    ("cat <(rm x)", "shell.blocked_commands"),
    ("ls > >(rm x)", "shell.blocked_commands"),
    ("X=$(rm x)", "shell.blocked_commands"),
    ("X=$(rm x) ls", "shell.blocked_commands"),
    ("export X=$(rm x)", "shell.blocked_commands"),
    ("a=(1 $(rm x))", "shell.blocked_commands"),
    ("a[$(rm x)]=1", "shell.blocked_commands"),
    ("echo ${x:-$(rm x)}", "shell.blocked_commands"),
    ("echo $((1 + $(rm x)))", "shell.blocked_commands"),
    ("f() { rm x; }; f", "shell.blocked_commands"),
    ("f() { rm x; }", "shell.blocked_commands"),
    ("git() { rm x; }; git", "shell.blocked_commands"),
    ("rm() { ls; }; rm", "shell.blocked_commands"),
    ("if rm x; then ls; fi", "shell.blocked_commands"),
    ("if ls; then rm x; fi", "shell.blocked_commands"),
    ("if ls; then ls; elif rm; then ls; fi", "shell.blocked_commands"),
    ("while rm x; do ls; done", "shell.blocked_commands"),
    ("until rm x; do ls; done", "shell.blocked_commands"),
    ("for i in $(rm x); do ls; done", "shell.blocked_commands"),
    ("for i in a; do rm $i; done", "shell.blocked_commands"),
    ("for ((i=0;i<3;i++)); do rm $i; done", "shell.blocked_commands"),
    ("case $(rm x) in a) ls;; esac", "shell.blocked_commands"),
    ("case x in x) rm x;; esac", "shell.blocked_commands"),
    ("cat <<EOF\n$(rm x)\nEOF", "shell.blocked_commands"),
    ("cat <<EOF | rm\nx\nEOF", "shell.blocked_commands"),
    ('cat <<<"$(rm x)"', "shell.blocked_commands"),
    (">f rm x", "shell.blocked_commands"),
    ("2>/dev/null rm x", "shell.blocked_commands"),
    ("X=1 rm x", "shell.blocked_commands"),
    ("X= rm x", "shell.blocked_commands"),
    ("[ -f x ] && rm x", "shell.blocked_commands"),
    # by spelling
    ("r\\m x", "shell.blocked_commands"),
    ('r"m" x', "shell.blocked_commands"),
    ("r'm' x", "shell.blocked_commands"),
    ("''rm x", "shell.blocked_commands"),
    ('"rm" x', "shell.blocked_commands"),
    ("\\rm x", "shell.blocked_commands"),
    ("/bin/rm x", "shell.blocked_commands"),
    ("/usr/bin/../bin/rm x", "shell.blocked_commands"),
    ("../../bin/rm x", "shell.blocked_commands"),
    ("/proc/self/root/bin/rm x", "shell.blocked_commands"),
    ("./rm x", "shell.blocked_commands"),
    ("r\\\nm x", "shell.unparsable"),
    ("$'rm' x", "shell.dynamic_program"),
    ("$'\\x72m' x", "shell.dynamic_program"),
    ("$X x", "shell.dynamic_program"),
    ('"$X" x', "shell.dynamic_program"),
    ("${X} x", "shell.dynamic_program"),
    ("$(echo rm) x", "shell.dynamic_program"),
    ('"$(echo rm)" x', "shell.dynamic_program"),
    ("r? x", "shell.dynamic_program"),
    ("/bin/r[m] x", "shell.dynamic_program"),
    ("{rm,x}", "shell.unparsable"),
    ("~/bin/x", "shell.dynamic_program"),
    ("g$X", "shell.dynamic_program"),
    ('f() { "$@"; }; f rm x', "shell.dynamic_program"),
    # wrappers
    ("env rm x", "shell.blocked_commands"),
    ("env A=b rm x", "shell.blocked_commands"),
    ("env -i - A=b rm x", "shell.blocked_commands"),
    ("env >f rm x", "shell.blocked_commands"),
    ("env -S 'rm x'", "shell.wrapper_option"),
    ("env --split-string='rm x'", "shell.wrapper_option"),
    ("env $X", "shell.dynamic_program"),
    ("/usr/bin/env rm", "shell.blocked_commands"),
    ("nohup nice -n 5 timeout 3 rm x", "shell.blocked_commands"),
    ("timeout $T rm", "shell.dynamic_program"),
    ("timeout --unknown 3 ls", "shell.wrapper_option"),
    ("stdbuf -o L rm", "shell.blocked_commands"),
    ("setsid -w rm", "shell.blocked_commands"),
    ("command rm x", "shell.blocked_commands"),
    ("command -p rm x", "shell.blocked_commands"),
    ("exec rm x", "shell.blocked_commands"),
    ("exec -a ls rm x", "shell.blocked_commands"),
    ("builtin eval 'rm x'", "shell.blocked_commands"),
    ("eval rm x", "shell.blocked_commands"),
    ("eval 'r''m x'", "shell.blocked_commands"),
    ("eval \"$X\"", "shell.dynamic_program"),
    ("eval 'eval \"rm x\"'", "shell.blocked_commands"),
    ("trap 'rm x' EXIT", "shell.blocked_commands"),
    ("trap -- 'rm x' EXIT", "shell.blocked_commands"),
    ("sudo ls", "shell.blocked_commands"),
    ("doas ls", "shell.allowed_binaries"),
    ("xargs rm", "shell.blocked_commands"),
    ("ls | xargs -0 -n 1 rm", "shell.blocked_commands"),
    ("ls | xargs --replace rm ls {}", "shell.blocked_commands"),
    ("ls | xargs --max-lines rm ls", "shell.blocked_commands"),
    ("ls | xargs --eof rm ls", "shell.blocked_commands"),
    ("ls | xargs -i rm", "shell.wrapper_option"),
    ("ls | xargs -I{} {} x", "shell.dynamic_program"),
    ("ls | xargs -I% sh -c 'cat %'", "shell.dynamic_program"),
    ("ls | xargs sh", "shell.dynamic_program"),
    ("ls | xargs env", "shell.dynamic_program"),
    ("ls | xargs git", "shell.dynamic_program"),
    ("ls | xargs sh -c 'rm \"$@\"' _", "shell.blocked_commands"),
    ("find . -exec rm {} \\;", "shell.blocked_commands"),
    ("find . -exec rm {} +", "shell.blocked_commands"),
    ("find . -execdir rm {} ';'", "shell.blocked_commands"),
    ("find . -ok rm {} \\;", "shell.blocked_commands"),
    ("find . -exec ls {} \\; -exec rm {} \\;", "shell.blocked_commands"),
    ("find . -exec {} \\;", "shell.dynamic_program"),
    ("find . -exec sh -c 'rm $1' _ {} \\;", "shell.blocked_commands"),
    ("find . -exec sh -c '{}' \\;", "shell.dynamic_program"),
    ("find . -exec rm", "shell.unparsable"),
    ("find $X", "shell.dynamic_program"),
    ("sh -c 'rm x'", "shell.blocked_commands"),
    ("bash -lc 'ls'", "shell.wrapper_option"),
    ("bash -c -e 'rm x'", "shell.blocked_commands"),
    ("bash -ec 'rm x'", "shell.blocked_commands"),
    ('sh -c "$X"', "shell.dynamic_program"),
    ("sh -c 'sh -c \"rm x\"'", "shell.blocked_commands"),
    ("sh -c '$0' rm", "shell.dynamic_program"),
    ("sh -c '\"$@\"' _ rm", "shell.dynamic_program"),
    ("echo 'rm x' | sh", "shell.dynamic_program"),
    ("bash -s <<E\nrm x\nE", "shell.wrapper_option"),
    ("bash <<E\nrm x\nE", "shell.dynamic_program"),
    ("bash <(echo rm)", "shell.dynamic_program"),
    ("bash /dev/stdin", "shell.dynamic_program"),
    ("bash --rcfile x", "shell.wrapper_option"),
    ("bash -O expand_aliases -c 'ls'", "shell.wrapper_option"),
    ("dash -c ls", "shell.allowed_binaries"),
    ("fish -c ls", "shell.dynamic_program"),
    ("busybox rm x", "shell.blocked_commands"),
    ("busybox sh -c 'rm x'", "shell.blocked_commands"),
    ("busybox $X", "shell.dynamic_program"),
    ("busybox wget x", "shell.allowed_binaries"),
    ("watch ls", "shell.dynamic_program"),
    ("su -c ls", "shell.dynamic_program"),
    ("npx rm", "shell.blocked_commands"),
    ("npm exec -- rm x", "shell.blocked_commands"),
    ("npx -p pkg rm x", "shell.blocked_commands"),
    ("strace -o '|rm x' ls", "shell.dynamic_program"),
    ("npm exec -c 'rm x'", "shell.exec_option"),
    # not listed
    ("wget x", "shell.allowed_binaries"),
    ("false && wget() { ls; }; wget x", "shell.allowed_binaries"),
    ("wget() { ls; } & wget x", "shell.allowed_binaries"),
    ("(wget() { ls; }); wget x", "shell.allowed_binaries"),
    ("wget() { ls; }; env wget x", "shell.allowed_binaries"),
    ("wget() { ls; }; command wget x", "shell.allowed_binaries"),
    ("wget() { ls; }; unset -f wget; wget x", "shell.builtin"),
    ("wget x; wget() { ls; }", "shell.allowed_binaries"),
    ("[ 'rm'", "shell.unparsable"),
    ("wget() { ls; }; unset wget; wget x", "shell.function"),
    ("wget() { ls; unset wget; }; wget; wget x", "shell.function"),
    ("wget() { ls; }; eval 'unset wget'; wget x", "shell.function"),
    ("source() { ls; }; source x", "shell.source"),
    # paths
    ("./script.sh", "shell.workspace_program"),
    ("sub/tool", "shell.workspace_program"),
    ("../x", "shell.program_path"),
    ("/tmp/git status", "shell.program_path"),
    ("/proc/self/root/usr/bin/git status", "shell.program_path"),
    ("/usr/bin/../../tmp/git", "shell.program_path"),
    ("/lib64/ld-linux-x86-64.so.2 /bin/ls", "shell.program_path"),
    ("ld.so /bin/ls", "shell.loader"),
    ("ld-linux-x86-64.so.2 /bin/ls", "shell.loader"),
    ("ld-musl-x86_64.so.1 /bin/ls", "shell.loader"),
    # the shell's own ways
    ("source x.sh", "shell.source"),
    (". ./x.sh", "shell.source"),
    ("alias ls=rm", "shell.builtin"),
    ("enable -f ./x.so y", "shell.builtin"),
    ("hash -p /bin/rm ls", "shell.builtin"),
    ("shopt -s expand_aliases", "shell.builtin"),
    ("mapfile -C 'rm x' y", "shell.builtin"),
    ("let 'x[$(rm y)]'", "shell.builtin"),
    ("jobs -x rm x", "shell.builtin"),
    ("wait -p 'x[$(rm y)]'", "shell.hidden_command"),
    ("declare -n x=PATH", "shell.builtin"),
    ("declare -i x=1", "shell.builtin"),
    ("BASH_ENV=./x bash -c ls", "shell.environment"),
    ("ENV=./x sh -c ls", "shell.environment"),
    ("PATH=.:$PATH git status", "shell.environment"),
    ("PATH=/tmp; git status", "shell.environment"),
    ("export PATH=/tmp", "shell.environment"),
    ("read PATH < f; git status", "shell.environment"),
    ("for PATH in /tmp; do git; done", "shell.environment"),
    ("printf -v PATH /tmp; git status", "shell.environment"),
    ("unset PATH; git", "shell.environment"),
    (": ${PATH:=/tmp}", "shell.environment"),
    ("read $X", "shell.environment"),
    ("LD_PRELOAD=./x.so ls", "shell.environment"),
    ("LD_LIBRARY_PATH=. ls", "shell.environment"),
    ("env LD_PRELOAD=./x.so ls", "shell.environment"),
    ("env PATH=. git", "shell.environment"),
    ("PS4='$(rm x)'; set -x; ls", "shell.hidden_command"),
    ("GIT_SSH_COMMAND='sh -c x' git fetch", "shell.environment"),
    ("GIT_EXTERNAL_DIFF=./x git diff", "shell.environment"),
    ("GIT_CONFIG_COUNT=1 git status", "shell.environment"),
    ("PAGER=./x git log", "shell.environment"),
    ("GIT_EDITOR=./x git commit", "shell.environment"),
    ("SHELL=./x make", "shell.environment"),
    ("MAKEFLAGS=--eval=x make", "shell.environment"),
    ("npm_config_script_shell=./x npm test", "shell.environment"),
    ("RUSTC_WRAPPER=./x cargo build", "shell.environment"),
    ("CARGO_BUILD_RUSTC=./x cargo build", "shell.environment"),
    ("x='a[$(rm y)]'; echo $((x))", "shell.hidden_command"),
    ("read 'x[$(rm y)]' < f", "shell.hidden_command"),
    ("test -v 'x[$(rm y)]'", "shell.hidden_command"),
    ("[[ 'x[$(rm y)]' -eq 1 ]]", "shell.hidden_command"),
    ("echo ${x@P}", "shell.unparsable"),
    ("echo ${!x}", "shell.unparsable"),
    ("cat < /dev/tcp/1.2.3.4/80", "shell.network_redirect"),
    ("exec 3> /dev/udp/1.2.3.4/53", "shell.network_redirect"),
    ("cat < /dev//tcp/1.2.3.4/80", "shell.network_redirect"),
    ("cat < /dev/$X/1.2.3.4/80", "shell.network_redirect"),
    ("x=/dev/tcp/1.2.3.4/80; cat < $x", "shell.network_redirect"),
    # options that run programs
    ("git -c core.sshCommand=x fetch", "shell.git_exec_option"),
    ("git -c alias.x='!rm x' x", "shell.git_exec_option"),
    ("git -c ALIAS.x='!rm x' x", "shell.git_exec_option"),
    ("git -c include.path=x status", "shell.git_exec_option"),
    ("git --exec-path=/tmp status", "shell.git_exec_option"),
    ("git --config-env=core.pager=X log", "shell.git_exec_option"),
    ("git fetch --upload-pack=./x", "shell.git_exec_option"),
    ("git fetch --upload-p ./x", "shell.git_exec_option"),
    ("git clone -u ./x a b", "shell.git_exec_option"),
    ("git clone -c core.sshCommand=x a", "shell.git_exec_option"),
    ("git clone ext::./x", "shell.git_exec_option"),
    ("git push --receive-pack=x", "shell.git_exec_option"),
    ("git archive --exec=x HEAD", "shell.git_exec_option"),
    ("git rebase -x 'rm x' HEAD~2", "shell.git_exec_option"),
    ("git rebase --exec 'rm x' HEAD~2", "shell.git_exec_option"),
    ("git grep -O./x foo", "shell.git_exec_option"),
    ("git config core.hooksPath x", "shell.git_exec_option"),
    ("git config --global alias.x '!rm'", "shell.git_exec_option"),
    ("git difftool -x rm", "shell.git_exec_option"),
    ("git bisect run rm x", "shell.blocked_commands"),
    ("git submodule foreach 'rm x'", "shell.blocked_commands"),
    ("git submodule foreach --recursive rm x", "shell.blocked_commands"),
    ("git $X", "shell.dynamic_program"),
    ('git "$X" y', "shell.dynamic_program"),
    ("git fetch $X", "shell.dynamic_program"),
    ("make -f -", "shell.exec_option"),
    ("make -f- <<E\nx:\nE", "shell.exec_option"),
    ("make --file=/dev/stdin", "shell.exec_option"),
    ("make -sf - x", "shell.exec_option"),
    ("make SHELL=/tmp/x", "shell.exec_option"),
    ("make 'X=$(shell rm x)'", "shell.exec_option"),
    ("make 'SHELL := /tmp/x'", "shell.exec_option"),
    ("make 'override SHELL=/tmp/x'", "shell.exec_option"),
    ("make 'X!=rm x'", "shell.exec_option"),
    ("make --eval='x:;rm x'", "shell.exec_option"),
    ("make -E 'x:;rm x'", "shell.exec_option"),
    ("make $X", "shell.dynamic_program"),
    ("npm --script-shell=./x test", "shell.exec_option"),
    ("npm test --script-shell ./x", "shell.exec_option"),
    ("npm config set script-shell ./x", "shell.exec_option"),
    ("cargo --config build.rustc=./x build", "shell.exec_option"),
    ("tar --to-command=./x -xf a", "shell.exec_option"),
    ("tar --checkpoint=1 --checkpoint-action=exec=x cf a b", "shell.exec_option"),
    ("tar --to-c=./x -xf a", "shell.exec_option"),
    ("tar -I ./x -xf a", "shell.exec_option"),
    ("ssh -oProxyCommand=./x h", "shell.exec_option"),
    ("sort --compress-program=./x a", "shell.exec_option"),
    # cannot be read
    ("", "shell.empty"),
    ("   ", "shell.empty"),
    ("# only a comment", "shell.empty"),
    ("ls 'unterminated", "shell.unparsable"),
    ('ls "unterminated', "shell.unparsable"),
    ("ls (", "shell.unparsable"),
    ("ls )", "shell.unparsable"),
    ("if ls; then", "shell.unparsable"),
    ("ls\x00", "shell.unparsable"),
    ("ls\rrm x", "shell.unparsable"),
    ("ls\x1b[2K", "shell.unparsable"),
    ("echo a\u00a0#; rm x", "shell.unparsable"),
    ("echo \u202egnp", "shell.unparsable"),
    ("echo \ud800", "shell.unparsable"),
    ("ls " + "a" * 65536, "shell.unparsable"),
    ("(" * 500 + "ls" + ")" * 500, "shell.unparsable"),
    ("a=(" * 20000, "shell.unparsable"),
    ("ls " + "{" * 4001, "shell.unparsable"),
    (")" * 60000, "shell.unparsable"),
    ("cat <<E\n" + "$x " * 20000 + "\nE", "shell.unparsable"),
    ("((rm x))", "shell.unparsable"),
    ("[[ a && rm ]]", "shell.unparsable"),
    ("[ a && rm b ]", "shell.unparsable"),
    ("echo $'a\\'; rm x #'", "shell.unparsable"),
    ("time { rm x; }", "shell.unparsable"),
    ("cat <<E\nx", "shell.unparsable"),
    ("ls \n\\\n rm x", "shell.unparsable"),
    ('ls "$\\\n(rm x)"', "shell.unparsable"),
    ("ls &> f rm x", "shell.unparsable"),
    ("cat <<'E F'\nx\nE F", "shell.unparsable"),
]  # fmt: skip


@pytest.mark.parametrize("line", ALLOWED)
def test_an_ordinary_line_is_allowed(line: str) -> None:
    answer = decide_command(SHELL, line)
    assert answer.decision.verdict == "allow", answer


@pytest.mark.parametrize(("line", "rule"), DENIED)
def test_a_refused_line_names_its_rule(line: str, rule: str) -> None:
    answer = decide_command(SHELL, line)
    assert (answer.decision.verdict, rule in _rules(SHELL, line)) == ("deny", True), answer
    assert answer.decision.reason.endswith(".") and "\n" not in answer.decision.reason


def _rules(shell: ShellPolicy, line: str) -> set[str]:
    answer = decide_command(shell, line)
    return {answer.decision.rule} | {c.decision.rule for c in answer.commands if c.decision.verdict == "deny"}


# -- confirmation --------------------------------------------------------------------------------------------

ASKING = SHELL.model_copy(
    update={"require_confirmation": True, "pre_approved": ("git status", "git log *", "ls; ls")}
)


@pytest.mark.parametrize("line", ["git status", "git log --oneline -5", "git log 'a b'", "ls; ls"])
def test_a_pre_approved_line_needs_no_confirmation(line: str) -> None:
    assert decide_command(ASKING, line).decision.rule == "shell.pre_approved"


@pytest.mark.parametrize(
    "line",
    [
        "git status ",
        "git status -s",
        "git log",
        "git logx y",
        "git log -5; ls",
        "git log $(ls)",
        "git log `ls`",
        "git log $X",
        "git log *",
        "git log > out",
        "git log <<< x",
        "git log -5 &",
        "git log | cat",
        "git log\nls",
        "ls;  ls",
    ],
)
def test_any_other_line_asks(line: str) -> None:
    answer = decide_command(ASKING, line)
    assert (answer.decision.verdict, answer.decision.rule) == ("confirm", "shell.require_confirmation"), (
        answer
    )


def test_a_refused_line_is_refused_even_when_it_is_pre_approved() -> None:
    shell = ASKING.model_copy(update={"pre_approved": ("rm x", "rm *")})
    assert decide_command(shell, "rm x").decision.verdict == "deny"


# -- what the answer tells -----------------------------------------------------------------------------------


def test_the_answer_lists_every_command_with_its_wrappers() -> None:
    commands = decide_command(SHELL, "timeout 5 env A=1 sh -c 'git \"$1\"; ls' _ x | wc").commands
    shown = [(command.program, command.wrappers) for command in commands]
    inner = ("timeout", "env", "sh")
    assert shown == [("sh", ("timeout", "env")), ("git", inner), ("ls", inner), ("wc", ())]


def test_words_that_are_only_known_at_run_time_are_none() -> None:
    (command,) = decide_command(SHELL, 'cat ./a "$x" b*').commands
    assert command.argv == ("cat", "./a", None, None)


def test_a_refusal_says_what_is_allowed_instead() -> None:
    reason = decide_command(ShellPolicy(allowed_binaries=("git", "make")), "wget x").decision.reason
    assert reason == (
        "`wget` was refused by shell.allowed_binaries: it is not an allowed program; "
        "allowed programs: git, make."
    )


def test_an_empty_policy_allows_no_program() -> None:
    assert decide_command(ShellPolicy(), "git status").decision.rule == "shell.allowed_binaries"
    assert decide_command(ShellPolicy(), "echo hello").decision.verdict == "allow"


def test_a_blocked_builtin_is_refused() -> None:
    shell = ShellPolicy(blocked_commands=("echo", "env"))
    assert decide_command(shell, "echo x").decision.rule == "shell.blocked_commands"
    assert decide_command(shell, "env ls").decision.rule == "shell.blocked_commands"


def test_a_wrapper_that_must_be_listed_does_not_hide_its_payload() -> None:
    shell = ShellPolicy(allowed_binaries=("git",))
    assert decide_command(shell, "sh -c 'git status'").decision.rule == "shell.allowed_binaries"
    assert decide_command(shell, "nohup git status").decision.verdict == "allow"


# -- properties ----------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["ok", "bad", "bad", "cat", " ", " ", "\n",
     ";", "&", "&&", "|", "||", "(", ")", "$(", "`", "'", '"', "\\",
     "\\\n", "{ ", "; }", "<<E", "\nE\n", "<<'E'", ">f", "&>f",
     "<<<", "x=", "$x", "${x:-", "}", "if ", "; then ",
     "; fi",
     "for i in a; do ", "; done", "f() ", "[ ", " ]", "[[ ", " ]]", "$((", "))", "eval ", "env ", "! ",
     "time ", "$'", "\\'", "#", " #", "*", "?", "case a in a) ", ";; esac", "export ", "<(", ">(", "coproc ",
     "{a,", "sh -c ", "'bad'", "b\\ad", "b'a'd", "exec ", "trap ", "EXIT", "|&", "2>&1", "while ", "select "]
)  # fmt: skip
BASES = st.sampled_from(
    [
        "ok a",
        "cat <<E\nx $y\nE\n",
        "if ok; then ok; fi",
        'x=$(ok); ok "$x"',
        "f() { ok; }; f",
        "cat <<'E' | ok\n'bad' $(bad)\nE\nok",
        "ok 'bad' \"bad\" # bad",
        'echo "a $(ok "b" \'c\') d"',
        "[[ a == b ]] || ok",
        "ok \\\n bad",
        "ok -m 'it'\\''s'",
        "ok &> f",
    ]
)


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    line = draw(BASES)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(line)))
        line = line[:position] + draw(PIECES) + line[position + draw(st.integers(0, 2)) :]
    return line


LINES = st.one_of(_mutated(), st.lists(PIECES, min_size=1, max_size=10).map("".join), st.text(max_size=40))


@given(LINES)
@settings(max_examples=400, deadline=None)
def test_no_line_makes_the_decision_fail(line: str) -> None:
    assert decide_command(SHELL, line).decision.verdict in ("allow", "deny")


@st.composite
def _quoted(draw: st.DrawFn, word: str) -> str:
    """A word in any mixture of quotings."""
    out = ""
    for character in word:
        out += draw(
            st.sampled_from(
                [character, f"\\{character}", f"'{character}'", f'"{character}"', f"''{character}"]
            )
        )
    return out


PLACES = st.sampled_from(
    ["{}", "ls; {}", "ls && {} x", "ls | {}", "( {} )", "{{ {}; }}", "echo $({} x)", 'echo "$({} x)"',
     "X=1 {} y", "if {}; then ls; fi", "for i in a; do {}; done", "env {}", "nohup nice {} x", "timeout 5 {}",
     "xargs {}",
     "find . -exec {} ';'", "command {}", "exec {}", "! {}", "time {}", "f() {{ {}; }}",
     "cat <<E\n$({})\nE", "ls > f; {}", ">f {} x", "/bin/{}", "./{}", "/usr//local/../bin/{} x", "ls &\n{}",
     "case a in a) {};; esac"]
)  # fmt: skip


@given(PLACES, _quoted("curl"))
@settings(max_examples=400, deadline=None)
def test_a_blocked_program_is_refused_in_any_quoting_and_place(place: str, word: str) -> None:
    line = place.format(word)
    assert decide_command(SHELL, line).decision.verdict == "deny", line


# -- against real shells -------------------------------------------------------------------------------------

STUBS = {"ok": "exit 0", "cat": 'exec /bin/cat "$@"', "bad": ': > "$MARK"', "time": '"$@"'}
STUB_POLICY = ShellPolicy(allowed_binaries=("ok", "cat", "sh", "bash"), blocked_commands=("bad",))
SHELLS = [path for path in (shutil.which("bash"), shutil.which("dash")) if path]


class _Sandbox:
    """A folder with stubs for programs: running a generated line in it can do nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = directory / "mark"
        (directory / "bin").mkdir()
        for name, body in STUBS.items():
            stub = directory / "bin" / name
            stub.write_text(f"#!/bin/sh\n{body}\n")
            stub.chmod(0o755)

    def runs_bad(self, shell: str, line: str) -> bool:
        environment = {"PATH": str(self.directory / "bin"), "MARK": str(self.mark)}
        work = self.directory / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with Path(os.devnull).open("r+b") as null:
            process = subprocess.Popen(
                [shell, "-c", line], cwd=work, env=environment, stdin=null, stdout=null, stderr=null
            )
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        was_run = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return was_run


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> _Sandbox:
    return _Sandbox(tmp_path_factory.mktemp("stubs"))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "line", ["bad", "ok; b'a'd", "echo $(bad)", "eval 'ba''d'", "x=bad; $x", "f() { bad; }; f"]
)
def test_the_control_really_runs_in_a_shell_and_is_refused_here(
    sandbox: _Sandbox, shell: str, line: str
) -> None:
    assert sandbox.runs_bad(shell, line)
    assert decide_command(STUB_POLICY, line).decision.verdict == "deny"


@given(LINES.filter(lambda line: "/" not in line and "\0" not in line and line.isascii()))
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@example("ok&> \\\n{  bad")
@example("ok \n\\\n bad")
@example('ok "$\\\n(bad)"')
@example("ok &>f bad")
@example("echo a\u00a0#; bad")
def test_no_line_that_is_allowed_runs_a_blocked_program_in_a_real_shell(sandbox: _Sandbox, line: str) -> None:
    if decide_command(STUB_POLICY, line).decision.verdict != "allow":
        return
    if "bad" not in re.sub(r"['\"\\\s]", "", line):
        return  # no spelling of the program is in it
    for shell in SHELLS:
        assert not sandbox.runs_bad(shell, line), (shell, line)
