from setuptools import find_packages, setup

setup(
    name="refbn_d2",
    version="0.1.0",
    description="Reference batch normalization for detection and segmentation with Detectron2",
    packages=find_packages(include=["refbn_d2", "refbn_d2.*"]),
    package_data={"refbn_d2": ["*.jinja"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.15,<3",
        "torchvision>=0.29,<1",
        "fvcore>=0.1.5.post20221221,<0.2",
        "pycocotools>=2.0.11,<3",
        "opencv-python>=5.0,<6",
        "numpy>=2.4,<3",
        "pillow>=12,<14",
        "matplotlib>=3.11,<4",
        "tensorboard>=2.21,<3",
        "tqdm>=4.67,<5",
        "pyyaml>=6.0,<7",
        "timm>=1.0.31,<2",
        "safetensors>=0.8,<1",
        "jinja2>=3.1,<4",
    ],
    extras_require={
        "test": [
            "pytest>=9,<10",
            "ruff>=0.17,<0.18",
            "onnx>=1.23,<2",
            "onnxruntime>=1.32,<2",
            "onnxscript>=0.7,<1",
            "webdataset>=1.0.2,<2",
        ],
    },
)
