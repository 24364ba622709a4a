"""What a bare clone is set up from: the Makefile, which looks for Java, and the locks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO

LOCKS = sorted((REPO / "requirements").glob("[!o]*.txt"))


@pytest.mark.parametrize(("version", "right"), [(None, False), ("11.0.2", False), ("17.0.9", True), ("21.0.1", True)])
def test_java_17_or_21_is_looked_for_and_else_the_command_that_installs_it_is_named(
    tmp_path: Path, version: str | None, right: bool
) -> None:
    if version:
        java = tmp_path / "bin" / "java"
        java.parent.mkdir()
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2024-01-16' >&2\n")
        java.chmod(0o755)
    words = ["make", "-C", str(REPO), "java"]
    done = subprocess.run(words, env={**os.environ, "JAVA_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode == 0) == right
    if not right:
        told = version.split(".")[0] if version else "not there"
        assert f"Spark needs Java 17 or 21; {tmp_path}/bin/java is {told}. Install it" in done.stderr
        assert "sudo apt-get install openjdk-17-jre-headless" in done.stderr


def test_a_python_is_looked_for_and_else_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    shutil.copy(REPO / "Makefile", tmp_path)
    shutil.copy(REPO / "requirements" / "uv.txt", tmp_path / "requirements")
    for name in ("python3.12", "python3.11", "python3"):
        (python := tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
    words = ["make", "-C", str(tmp_path), ".venv/uv"]
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode
    assert "Python 3.11 or 3.12 with its venv module was not found" in done.stderr
    assert "sudo apt-get install python3.11 python3.11-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda file: file.name)
def test_a_lock_pins_every_package_by_its_hashes_and_names_no_index(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text)
    packages = re.findall(r"^[A-Za-z0-9_.-]+==\S+(?: ;[^\\\n]*)?(.*(?:\n {4}.*)*)", text, re.M)
    assert len(packages) == len(re.findall(r"^[A-Za-z0-9]", text, re.M)) > 0
    assert all("--hash=sha256:" in package for package in packages)
