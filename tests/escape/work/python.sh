# venv, multiprocessing in its three start methods, shared memory, asyncio, sqlite, ctypes callbacks, a pty.
set -eu
python3 -m venv env
env/bin/pip --version > /dev/null
cat > test_work.py <<'PYTHON'
import asyncio
import ctypes
import multiprocessing
import os
import pty
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory


class Work(unittest.TestCase):
    def test_pools(self):
        for method in ("fork", "spawn", "forkserver"):
            with self.subTest(method), multiprocessing.get_context(method).Pool(2) as pool:
                self.assertEqual(pool.map(abs, [-1, -2]), [1, 2])

    def test_threads(self):
        with ThreadPoolExecutor(4) as pool:
            self.assertEqual(sum(pool.map(abs, range(-9, 0))), 45)

    def test_shared_memory(self):
        block = shared_memory.SharedMemory(create=True, size=4096)
        block.close()
        block.unlink()

    def test_asyncio(self):
        async def main():
            child = await asyncio.create_subprocess_exec("/bin/echo", "a", stdout=subprocess.PIPE)
            self.assertEqual(await child.communicate(), (b"a\n", None))
            server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            self.assertEqual(await reader.read(), b"")
            writer.close()
            server.close()

        asyncio.run(main())

    def test_sqlite(self):
        base = sqlite3.connect("base.db")
        base.execute("pragma journal_mode=wal")
        base.execute("create table t(a)")
        base.commit()
        base.close()

    def test_ctypes_callback(self):
        self.assertEqual(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 5)(), 5)

    def test_names(self):
        self.assertTrue(socket.getaddrinfo("localhost", 80))

    def test_pty(self):
        self.assertEqual(pty.spawn(["/bin/true"], lambda fd: os.read(fd, 1)), 0)

    def test_copies(self):
        with tempfile.TemporaryDirectory(dir=".") as place:
            shutil.copytree("env", place + "/env", symlinks=True)
PYTHON
python3 -m unittest test_work
