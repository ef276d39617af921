"""Policies and images for the tests of the self-test."""

from __future__ import annotations

import json
from typing import Any

from sandbox.container.image_index import ImageIndex
from sandbox.policy.model import Policy

PROGRAMS = ("git", "sh", "python3.11", "curl", "id")


def policy(**sections: Any) -> Policy:
    return Policy.model_validate_json(json.dumps({"name": "test", **sections}))


def image(*more: str) -> ImageIndex:
    programs = {f"/usr/bin/{name}": f"content of {name}" for name in (*PROGRAMS, *more)}
    programs["/usr/local/bin/curl-again"] = programs["/usr/bin/curl"]
    programs["/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"] = "the loader"
    links = {"/usr/bin/python3": "python3.11", "/lib64": "/usr/lib/x86_64-linux-gnu", "/bin": "usr/bin"}
    return ImageIndex("sha256:0", programs, links, {})
