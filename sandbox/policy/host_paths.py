"""Name the paths that run code on the machine of whoever takes a patch. Data, and one look-up. D4

The line: what runs *without the reader deciding to run this project* is listed — by opening the folder
in an editor, entering it in a shell, the next git command, a push that starts a CI server, a package
manager or coding agent that is started for any purpose. A Makefile, ``package.json``, ``conftest.py``
or ``build.rs`` is not: it is the project's own code, read in the patch and run on purpose.
"""

from __future__ import annotations

import re

from sandbox.policy.globs import compile_glob, decode_path

_GIT = "git runs programs named in it at the next git command"
_HOOK = "runs at the next commit, checkout or push"
_CI = "a CI server runs it, with its credentials, when it is pushed"
_AGENT = "a coding agent on this machine takes tools, hooks or instructions from it"
_EDITOR = "an editor or IDE runs tasks, plugins or interpreters named in it when the folder is opened"
_SHELL = "a shell or debugger runs it on start or on entering the folder"
_PACKAGES = "a package manager or build tool takes its registry, plugins or wrapper programs from it"
_PYTHON = "Python runs it at the start of every interpreter that finds it"
_LOGIN = "the desktop or the login session starts what it names"
_TOOL = "a command-line tool runs helper programs named in it"

HOST_EXECUTION: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_GIT, (".git", "git~[0-9]", ".gitconfig", ".gitmodules", ".gitattributes", ".lfsconfig")),
    (_HOOK, (".githooks", ".hooks", ".husky", ".huskyrc*", "lefthook.y*ml", ".lefthook", ".lefthook.y*ml")),
    (_HOOK, (".pre-commit-config.y*ml", ".pre-commit-hooks.y*ml", ".overcommit.yml", ".lintstagedrc*")),
    (_CI, ("**/.github/workflows", "**/.github/actions", "**/.gitea/workflows", "**/.forgejo/workflows")),
    (_CI, (".gitlab-ci*.y*ml", "**/.gitlab/ci", ".circleci", "Jenkinsfile*", "*.jenkinsfile", ".ci")),
    (_CI, ("azure-pipelines*.y*ml", ".azure-pipelines", ".azuredevops", "bitbucket-pipelines.y*ml")),
    (
        _CI,
        (".travis.y*ml", "appveyor.y*ml", ".appveyor.y*ml", ".drone.y*ml", ".drone.star", ".drone.jsonnet"),
    ),
    (_CI, (".woodpecker", ".woodpecker.y*ml", ".buildkite", ".teamcity", ".semaphore", ".cirrus.*")),
    (
        _CI,
        ("cloudbuild.y*ml", "buildspec*.y*ml", ".builds", ".build.y*ml", ".tekton", ".zuul.y*ml", ".zuul.d"),
    ),
    (_AGENT, (".mcp.json", "mcp.json", ".claude", ".cursor", ".gemini", ".codex", ".windsurf", ".continue")),
    (_AGENT, (".aider*", ".roo", ".roomodes", ".cline*", ".kiro", ".amazonq", ".opencode", "opencode.json*")),
    (_AGENT, (".cursorrules", ".windsurfrules", ".goosehints", "CLAUDE.md", "CLAUDE.local.md", "AGENTS.md")),
    (_AGENT, (".agents", ".agent", ".junie", ".qwen", ".trae", ".augment*", ".crush.json", "crush.json")),
    (_AGENT, ("**/.github/prompts", "**/.github/agents", "**/.github/chatmodes", "**/.github/hooks")),
    (_AGENT, ("AGENT.md", "GEMINI.md", "**/.github/copilot-instructions.md", "**/.github/instructions")),
    (
        _EDITOR,
        (".vscode", "*.code-workspace", ".idea", "*.iml", ".fleet", ".zed", ".vs", "*.sublime-project"),
    ),
    (_EDITOR, (".vimrc", ".gvimrc", ".exrc", ".nvimrc", ".nvim.lua", ".lvimrc", ".local.vimrc", ".vim")),
    (
        _EDITOR,
        (".dir-locals*.el", ".emacs", ".emacs.d", ".projectile", ".devcontainer", ".devcontainer.json"),
    ),
    (_EDITOR, (".gitpod.y*ml", ".gitpod.Dockerfile", ".idx")),
    (_EDITOR, (".helix", ".lazy.lua", ".nova", ".theia", ".replit", ".codesandbox", ".stackblitzrc")),
    (_SHELL, (".envrc", ".bashrc", ".bash_profile", ".bash_login", ".bash_logout", ".bash_aliases")),
    (_SHELL, (".profile", ".zshrc", ".zshenv", ".zprofile", ".zlogin", ".zlogout", ".kshrc", ".mkshrc")),
    (_SHELL, (".cshrc", ".tcshrc", ".login", ".logout", "**/.config/fish", ".xonshrc", ".autoenv*")),
    (_SHELL, (".gdbinit", ".lldbinit", ".tmux.conf", ".screenrc", ".xprofile", ".xinitrc", ".xsession*")),
    (_SHELL, (".mise*", "mise.toml", "mise.*.toml", "**/.config/mise", ".tool-versions", ".rtx.toml")),
    (_PACKAGES, (".npmrc", ".yarnrc*", ".yarn", ".pnpmfile.*", "pnpmfile.*", "bunfig.toml", ".bunfig.toml")),
    (_PACKAGES, ("**/.cargo/config*", "**/.cargo/credentials*", "rust-toolchain", "rust-toolchain.toml")),
    (_PACKAGES, ("pip.conf", "pip.ini", ".pypirc", ".condarc", ".gemrc", ".bundle", "nuget.config")),
    (
        _PACKAGES,
        (".mvn", "mvnw*", "gradlew*", "**/gradle/wrapper", ".gradle", ".sbtopts", ".jvmopts", ".bazelrc"),
    ),
    (
        _PYTHON,
        ("*.pth", "sitecustomize.py", "usercustomize.py", "pyvenv.cfg", ".venv", ".pythonrc*", ".pdbrc*"),
    ),
    (_LOGIN, ("**/.config/autostart", "**/.config/systemd", "**/.local/share/applications", "*.desktop")),
    (_LOGIN, ("**/Library/LaunchAgents", "autorun.inf", "desktop.ini")),
    (
        _TOOL,
        (".ssh", ".gnupg", ".netrc", ".curlrc", ".wgetrc", ".docker", "**/.aws/config", "**/.kube/config"),
    ),
    (
        _TOOL,
        (
            ".psqlrc",
            ".sqliterc",
            ".irbrc",
            ".pryrc",
            ".Rprofile",
            ".ansible.cfg",
            "ansible.cfg",
            ".terraformrc",
        ),
    ),
)
"""Reason, and the globs it holds for. A match covers everything beneath it."""

# Code points that HFS+ leaves out when it compares names: ".g<ZWNJ>it" is ".git" there.
_IGNORED_BY_HFS = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")


def runs_on_host(path: bytes) -> str | None:
    """Return why a changed path would run code on the machine the patch is applied to, else None.

    ``path`` is canonical and relative to the workspace. Names are compared the way the most forgiving
    filesystems do (case folded, trailing dots and spaces and ``:stream`` dropped, code points ignored
    by HFS+ removed), because the reader of the patch may sit at any of them.
    """
    if (found := _COMBINED.match(_as_forgiving_filesystem(path))) is None:
        # A folder with HEAD, config, objects/ and refs/ is a repository to git, wherever it lies. As
        # spelled: plenty of honest folders are called "head".
        return _GIT if path.endswith(b"/HEAD") or path == b"HEAD" else None
    assert found.lastgroup is not None  # noqa: S101  # every alternative is a named group
    return HOST_EXECUTION[int(found.lastgroup[1:])][0]


def _as_forgiving_filesystem(path: bytes) -> str:
    segments = _IGNORED_BY_HFS.sub("", decode_path(path)).casefold().split("/")
    return "/".join(segment.split(":", 1)[0].rstrip(". ") or segment for segment in segments)


_COMBINED = re.compile(
    "|".join(
        f"(?P<r{index}>{'|'.join(compile_glob(pattern.casefold()).regex for pattern in patterns)})"
        for index, (_, patterns) in enumerate(HOST_EXECUTION)
    ),
    re.DOTALL,
)
