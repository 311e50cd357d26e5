from __future__ import annotations

import inspect
import subprocess
import sys

from handlers import image_handler


def test_the_entry_module_defines_exactly_one_class_and_no_handle_function():
    """TorchServe's loader refuses two classes and prefers a function named `handle`."""
    classes = [
        c for _, c in inspect.getmembers(image_handler, inspect.isclass) if c.__module__ == image_handler.__name__
    ]
    assert [c.__name__ for c in classes] == ["ImageHandler"]
    assert not hasattr(image_handler, "handle")


def test_the_entry_module_imports_bare(tmp_path):
    """An ImportError would reach the log as `No module named ts.torch_handler.image_handler`.

    And light: torch, torchvision and pytorch_grad_cam cost a predicting worker 5 s and 400 MB.
    """
    package = image_handler.__file__.removesuffix("/image_handler.py")
    (tmp_path / "handlers").symlink_to(package)
    (tmp_path / "image_handler.py").symlink_to(image_handler.__file__)
    heavy = {"torch", "torchvision", "pytorch_grad_cam", "matplotlib", "cv2", "scipy"}
    code = f"import image_handler; print(image_handler.ImageHandler.__module__, {heavy} & set(sys.modules))"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stdout.strip() == "image_handler set()", result.stderr
