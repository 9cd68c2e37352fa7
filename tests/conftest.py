"""Where test data lies, and the ledger of golden values that were compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
COMPARED: set[tuple[str, str]] = set()


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        message = f"no test data at {folder}; set {variable} to the folder that holds it"
        if os.environ.get("LRMIL_REQUIRE_TEST_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _float32_on_every_cpu() -> Iterator[None]:
    """Let `precision: auto` mean float32: tests that compare answers ask for digits that bfloat16 does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrmil.encoders.embedding.cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real slides, bad files, tissue cases, labelled tissue and weights."""
    return _folder("LRMIL_TEST_DATA", SHARED / "data")


class GoldenFile:
    """One .npz of arrays made by an original program. `expect` compares and enters the key into the ledger."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        return self.arrays[key]

    def under(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Entries whose key starts with `prefix`, with the prefix cut off."""
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def expect(self, key: str, actual: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
        """Assert that `actual` (array, tensor or number) equals the golden entry `key`."""
        if hasattr(actual, "detach"):
            actual = actual.detach().cpu().numpy()
        actual = np.asarray(actual)
        wanted = self.arrays[key]
        assert actual.shape == wanted.shape, f"{self.name}:{key}: shape {actual.shape}, golden {wanted.shape}"
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol, err_msg=f"{self.name}:{key}")
        COMPARED.add((self.name, key))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], GoldenFile]:
    """`golden("abmil_plain")` loads a file of golden arrays."""
    folder = _folder("LRMIL_TEST_GOLDEN", SHARED / "golden")
    return lambda name: GoldenFile(folder / f"{name}.npz")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden"] = sorted(COMPARED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    COMPARED.update(map(tuple, node.workeroutput.get("golden", [])) if hasattr(node, "workeroutput") else [])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    files = sorted({name for name, _ in COMPARED})
    terminalreporter.write_line(f"golden keys compared: {len(COMPARED)} in {len(files)} files {files}")
