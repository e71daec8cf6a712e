"""Every process that has this folder on PYTHONPATH gets the emulator's kernels with its first import of torch_npu."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path


class AfterTorchNpu:
    """Lets torch_npu load, then puts the kernels in their places."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Wrap the loader of torch_npu; leave every other import alone."""
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_install(module):
                load(module)
                emulator().install()

            spec.loader.exec_module = load_and_install
        return spec


def emulator():
    """Return npu_emulator.kernels, loaded by its place: the folder above holds modules that are not ours to expose."""
    if "npu_emulator" not in sys.modules:
        home = Path(__file__).resolve().parents[1]
        spec = importlib.util.spec_from_file_location("npu_emulator", home / "__init__.py")
        module = sys.modules["npu_emulator"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    from npu_emulator import kernels

    return kernels


if "NPU_EMULATOR" in os.environ:
    sys.meta_path.insert(0, AfterTorchNpu)
