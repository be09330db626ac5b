"""The compiled part of the package; everything else is said in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "apollo_qn.backends._kernel",
            ["src/apollo_qn/backends/kernel.c"],
            depends=["src/apollo_qn/backends/kernel.h"],
            # no fused multiply-add: the same bits on every machine
            extra_compile_args=[
                *("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno"),
                *("-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"),
            ],
            libraries=["m"],
            py_limited_api=True,  # one wheel for all: it needs no header of Python or torch
            optional=True,  # without a compiler the foreach back end serves
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
