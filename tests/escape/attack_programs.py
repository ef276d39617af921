"""Try, from inside a container, to run a program that the policy does not let run; run by its Python.

Arguments: the target's path in the image; the path of another program, a listed one; a directory on the
image's own file system; then the bytes of a program and of a library that no image has, in base64.
Prints one line of JSON per attempt: its name, and ``ran`` or what stood in the way. Each attempt has a
process of its own; whether it ran is told by what the target itself prints.
"""

import base64
import ctypes
import errno
import json
import os
import subprocess
import sys

TARGET, LISTED, IMAGE_DIRECTORY = sys.argv[1:4]
PROGRAM, LIBRARY = (base64.b64decode(text) for text in sys.argv[4:6])
SCRIPT = 'print "attack" . "-ran\\n"'  # in two, so that no message which quotes it looks like its output
SAY = ["-e", SCRIPT]
LOADER = "/lib64/ld-linux-x86-64.so.2"
PLACES = ("/workspace", "/tmp", "/home/agent", "/run", "/var/tmp", "/dev/shm")
AT_EMPTY_PATH = 0x1000
EXECVEAT, MEMFD_CREATE, UNSHARE, MOUNT = 322, 319, 272, 165
libc = ctypes.CDLL(None, use_errno=True)
attempts = {}


def attempt(name):
    def keep(function):
        attempts[name] = function
        return function

    return keep


def syscall(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def execute(path, *arguments):
    os.execv(path, ["perl", *arguments])


def target_bytes():
    with open(TARGET, "rb") as file:
        return file.read()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, 0o755)
    return path


# --- the target by its names ---
attempt("name on PATH")(lambda: os.execvp(os.path.basename(TARGET), ["perl", *SAY]))
attempt("full path")(lambda: execute(TARGET, *SAY))
attempt("path through ..")(lambda: execute(f"/usr/lib/..{TARGET.removeprefix('/usr')}", *SAY))
attempt("/proc/self/root")(lambda: execute(f"/proc/self/root{TARGET}", *SAY))
attempt("/proc/self/cwd")(
    lambda: (os.chdir("/usr"), execute(f"/proc/self/cwd{TARGET.removeprefix('/usr')}", *SAY))
)
attempt("relative to its directory")(
    lambda: (os.chdir(os.path.dirname(TARGET)), execute("./" + os.path.basename(TARGET), *SAY))
)


@attempt("its other names in the image")
def other_names():
    directory = os.path.dirname(TARGET)
    for name in sorted(os.listdir(directory)):
        if name.startswith("perl5."):
            subprocess.run([f"{directory}/{name}", *SAY], check=False)


for mode, flags in {"read": os.O_RDONLY, "path only": os.O_PATH}.items():
    attempt(f"/proc/self/fd/N, opened to {mode}")(
        lambda flags=flags: execute(f"/proc/self/fd/{os.dup(os.open(TARGET, flags))}", *SAY)
    )


@attempt("execveat on an open descriptor")
def by_execveat():
    texts = [b"perl", *(text.encode() for text in SAY)]
    argv = (ctypes.c_char_p * (len(texts) + 1))(*texts, None)
    fd = os.open(TARGET, os.O_PATH)
    syscall(EXECVEAT, fd, b"", argv, (ctypes.c_char_p * 1)(None), AT_EMPTY_PATH)


# --- by something else that starts it ---
attempt("the dynamic loader")(lambda: os.execv(LOADER, [LOADER, TARGET, *SAY]))
attempt("the dynamic loader, through /proc/self/root")(
    lambda: os.execv(LOADER, [LOADER, f"/proc/self/root{TARGET}", *SAY])
)
attempt("an interpreter's posix_spawn")(lambda: os.waitpid(os.posix_spawn(TARGET, ["perl", *SAY], {}), 0))
attempt("a shell's exec")(lambda: os.execv("/bin/sh", ["sh", "-c", f"exec {TARGET} -e '{SCRIPT}'"]))
attempt("a shell, by another argv[0]")(
    lambda: os.execv("/bin/bash", ["bash", "-c", f"exec -a git {TARGET} -e '{SCRIPT}'"])
)
attempt("env")(lambda: os.execvp("env", ["env", TARGET, *SAY]))
attempt("xargs")(lambda: os.execvp("xargs", ["xargs", "-a", "/dev/null", TARGET, *SAY]))
attempt("find -exec")(lambda: os.execvp("find", ["find", "/etc/passwd", "-exec", TARGET, *SAY, ";"]))


@attempt("a git alias")
def by_git():
    os.environ["HOME"] = "/tmp"
    os.execvp("git", ["git", "-c", f"alias.x=!{TARGET} -e '{SCRIPT}'", "x"])


@attempt("a make recipe")
def by_make():
    recipe = f"all:\n\t{TARGET} -e '{SCRIPT}'\n"
    subprocess.run(["make", "-s", "-f", "-"], input=recipe.encode(), check=False)


@attempt("make, with it for a shell")
def by_make_shell():
    recipe = f"SHELL = {TARGET}\n.SHELLFLAGS = -e\nall:\n\t@{SCRIPT} if 1;\n"
    subprocess.run(["make", "-s", "-f", "-"], input=recipe.encode(), check=False)


attempt("sed's e command")(lambda: os.execvp("sed", ["sed", f"1e {TARGET} -e '{SCRIPT}'", "/etc/passwd"]))
attempt("awk's system()")(
    lambda: os.execvp(
        "awk", ["awk", f"BEGIN {{ system(\"{TARGET} -e 'print 1; print q(attack) . q(-ran)'\") }}"]
    )
)


def git(*arguments, **env):
    """Run git on a repository of its own, which allows everything that could hold it up."""
    os.environ.update({"HOME": "/tmp", "GIT_TERMINAL_PROMPT": "0", **env})
    subprocess.run(["git", "init", "-q", "/tmp/repository"], check=True)
    subprocess.run(["git", "-C", "/tmp/repository", *arguments], check=False, stdin=subprocess.DEVNULL)


def script_for_the_target(path):
    return write(path, f"#!/bin/sh\nexec {TARGET} -e '{SCRIPT}'\n".encode())


attempt("git's ssh command")(
    lambda: git("-c", f"core.sshCommand={TARGET} -e '{SCRIPT}' >&2 #", "ls-remote", "ssh://nowhere/x")
)
attempt("git's editor")(lambda: git("-c", f"core.editor={TARGET} -e '{SCRIPT}' #", "config", "-e"))


@attempt("a git hook")
def by_hook():
    git("status")
    hooks = "/workspace/hooks"
    os.makedirs(hooks, exist_ok=True)
    script_for_the_target(f"{hooks}/pre-commit")
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"core.hooksPath={hooks}"]
    git(*who, "commit", "--allow-empty", "-m", "x")


@attempt("a thread's execve, beside others")
def by_thread():
    import threading

    threads = [threading.Thread(target=lambda: execute(TARGET, *SAY), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


attempt("/dev/fd/N")(lambda: execute(f"/dev/fd/{os.dup(os.open(TARGET, os.O_RDONLY))}", *SAY))


@attempt("a shebang line")
def by_shebang():
    execute(write("/workspace/script", f"#!{TARGET}\n{SCRIPT}\n".encode()))


@attempt("a script of the image read by a shell")
def by_reading_a_script():
    subprocess.run(["sh", "/usr/bin/ldd", "--version"], check=False)
    # ldd says its own name; nothing else does
    with open("/usr/bin/ldd") as file:
        if "TRACE_LOADED_OBJECTS" in file.read():
            os.write(1, b"attack-ran")


# --- under another name, in every place that can be written ---
for place in PLACES:
    attempt(f"symlink in {place}")(
        lambda place=place: (os.symlink(TARGET, f"{place}/link"), execute(f"{place}/link", *SAY))
    )
    attempt(f"copy in {place}")(lambda place=place: execute(write(f"{place}/copy", target_bytes()), *SAY))
    attempt(f"copy in {place}, through the loader")(
        lambda place=place: os.execv(LOADER, [LOADER, write(f"{place}/copy", target_bytes()), *SAY])
    )
    if place != "/dev/shm":  # a mount of its own in any container: there is no control
        attempt(f"hard link in {place}")(
            lambda place=place: (os.link(TARGET, f"{place}/hard"), execute(f"{place}/hard", *SAY))
        )

    @attempt(f"O_TMPFILE in {place}")
    def by_tmpfile(place=place):
        content = target_bytes()
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o755)
        os.write(fd, content)
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        os.close(fd)
        os.set_inheritable(readable, True)
        execute(f"/proc/self/fd/{readable}", *SAY)


attempt("hard link beside it")(
    lambda: (os.link(TARGET, f"{IMAGE_DIRECTORY}/hard"), execute(f"{IMAGE_DIRECTORY}/hard", *SAY))
)


def memory_file(content):
    fd = syscall(MEMFD_CREATE, b"x", 0)
    os.write(fd, content)
    return f"/proc/self/fd/{fd}"


attempt("memfd_create and fexecve")(lambda: execute(memory_file(target_bytes()), *SAY))
attempt("memfd_create, through the loader")(
    lambda: os.execv(LOADER, [LOADER, memory_file(target_bytes()), *SAY])
)


@attempt("overwriting a listed program")
def by_overwriting():
    content = target_bytes()
    with open(LISTED, "wb") as file:
        file.write(content)
    execute(LISTED, *SAY)


@attempt("renaming it over a listed program")
def by_renaming():
    write(f"{IMAGE_DIRECTORY}/again", target_bytes())
    os.rename(f"{IMAGE_DIRECTORY}/again", LISTED)
    execute(LISTED, *SAY)


@attempt("a bind mount over a listed program")
def by_mounting():
    syscall(UNSHARE, 0x00020000)  # CLONE_NEWNS
    syscall(MOUNT, TARGET.encode(), LISTED.encode(), b"", 0x1000, None)  # MS_BIND
    execute(LISTED, *SAY)


@attempt("a binfmt handler")
def by_binfmt():
    # In a user namespace of its own, where the kernel keeps handlers apart: the machine's are not touched.
    uid, gid = os.getuid(), os.getgid()
    syscall(UNSHARE, 0x10000000 | 0x00020000)  # CLONE_NEWUSER, CLONE_NEWNS
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    os.makedirs("/tmp/binfmt", exist_ok=True)
    syscall(MOUNT, b"none", b"/tmp/binfmt", b"binfmt_misc", 0, None)
    with open("/tmp/binfmt/register", "w") as file:
        file.write(f":attack:M::#attack::{TARGET}:")
    execute(write("/tmp/handled", f"#attack\n{SCRIPT}\n".encode()))


# --- a program that was never in the image ---
for place in PLACES:

    @attempt(f"own program, byte by byte, in {place}")
    def by_bytes(place=place):
        path = f"{place}/own"
        with open(path, "wb", buffering=0) as file:
            for byte in PROGRAM:
                file.write(bytes([byte]))
        os.chmod(path, 0o755)
        execute(path)

    attempt(f"own program through the loader, in {place}")(
        lambda place=place: os.execv(LOADER, [LOADER, write(f"{place}/own-for-loader", PROGRAM)])
    )

    @attempt(f"LD_PRELOAD of an own library in {place}")
    def by_preload(place=place):
        os.environ["LD_PRELOAD"] = write(f"{place}/own.so", LIBRARY)
        os.execvp("cat", ["cat", "/dev/null"])

    attempt(f"dlopen of an own library in {place}")(
        lambda place=place: ctypes.CDLL(write(f"{place}/own-dl.so", LIBRARY))
    )

    @attempt(f"import of an own module in {place}")
    def by_import(place=place):
        write(f"{place}/attackmodule.so", LIBRARY)
        sys.path.insert(0, place)
        __import__("attackmodule")

    @attempt(f"LD_AUDIT of an own library in {place}")
    def by_audit(place=place):
        os.environ["LD_AUDIT"] = write(f"{place}/audit.so", LIBRARY)
        os.execvp("cat", ["cat", "/dev/null"])

    @attempt(f"own library on LD_LIBRARY_PATH in {place}")
    def by_library_path(place=place):
        write(f"{place}/libz.so.1", LIBRARY)
        os.environ["LD_LIBRARY_PATH"] = place
        os.execvp("python3", ["python3", "-V"])

    attempt(f"own library preloaded by the loader, in {place}")(
        lambda place=place: os.execv(
            LOADER, [LOADER, "--preload", write(f"{place}/pre.so", LIBRARY), "/bin/cat"]
        )
    )

attempt("own program written over a listed program")(lambda: execute(write(LISTED, PROGRAM)))
attempt("own program renamed over a listed program")(
    lambda: (os.rename(write(f"{IMAGE_DIRECTORY}/own", PROGRAM), LISTED), execute(LISTED))
)
attempt("own program by memfd_create")(lambda: execute(memory_file(PROGRAM)))
attempt("own program by memfd_create, through the loader")(
    lambda: os.execv(LOADER, [LOADER, memory_file(PROGRAM)])
)


def outcome(function):
    """Run one attempt in a process of its own, and tell how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(reading)
        try:
            function()
            os._exit(0)
        except OSError as error:
            os.write(2, errno.errorcode.get(error.errno or 0, str(error)).encode())
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(99)
    os.close(writing)
    said = b""
    while piece := os.read(reading, 65536):
        said += piece
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if b"attack-ran" in said:
        return "ran"
    code = os.waitstatus_to_exitcode(status)
    if b"blocked by policy" in said:
        return "blocked by policy"
    for reason, text in {"EACCES": b"Permission denied", "EPERM": b"not permitted"}.items():
        if text in said:
            return reason
    return said.decode("utf-8", "replace").strip()[-60:] if code == 99 else f"exit {code} {said[-60:]!r}"


os.chdir("/workspace")
for name, function in attempts.items():
    print(json.dumps([name, outcome(function)]), flush=True)
