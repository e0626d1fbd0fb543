from pathlib import Path

from setuptools import find_packages, setup

DALI = 'nvidia-dali-cuda130; platform_system == "Linux"'
PLOT = ["matplotlib>=3.8"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.15", "rich>=13", "scipy>=1.11", "wandb>=0.19"]

setup(
    name="fastsmooth",
    version="0.1.0",
    description="Train image classifiers under noise schedules and measure how far SGD noise "
    "smooths the loss",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    install_requires=["torch>=2.10", "torchvision>=0.25", "numpy>=1.26"],
    extras_require={
        "dali": [DALI],
        "wandb": ["wandb>=0.19"],
        "progress": ["rich>=13"],
        "timm": ["timm>=1.0"],
        "plot": PLOT,
        "test": TEST,
        "ray": ["ray>=2.40"],
        "bench": ["opacus>=1.5", "backpack-for-pytorch>=1.7"],
        "all": [DALI, "timm>=1.0", *PLOT, *TEST],
    },
    packages=[*find_packages(include=["fastsmooth", "fastsmooth.*"]), "fastsmooth.kernels"],
    entry_points={"console_scripts": ["fastsmooth = fastsmooth.__main__:entry"]},
    package_dir={"fastsmooth.kernels": "kernels"},
    package_data={
        "fastsmooth.report": ["style.css"],
        "fastsmooth.data": ["digits.npz", "digits.LICENSE.txt"],
        "fastsmooth.kernels": ["cpu.cpp"],
    },
)
