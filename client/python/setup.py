# SPDX-License-Identifier: Apache-2.0
"""Generates the gRPC stubs while the package is built: they are never in the repository."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = pathlib.Path(__file__).resolve().parent
PROTOS = ["bebop/v1/rollout.proto", "bebop/v1/info.proto", "bebop/v1/weights.proto", "bebop/v1/control.proto", "bebop/rpc/status.proto",
          "bebop/rpc/health.proto"]


def proto_root():
    """The repository's protos or, in a source distribution, the copy that came along."""
    for root in (HERE / "proto", HERE.parent.parent / "proto"):
        if (root / PROTOS[0]).exists():
            return root
    raise RuntimeError(f"{PROTOS[0]} is neither in {HERE / 'proto'} nor in {HERE.parent.parent / 'proto'}")


def generate(root, out):
    import grpc_tools
    from grpc_tools import protoc

    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}",
                        *[str(root / proto) for proto in PROTOS]])
    if code != 0:
        raise RuntimeError(f"protoc failed with status {code}")
    for package in ("bebop/v1", "bebop/rpc"):
        (out / package / "__init__.py").write_text("# SPDX-License-Identifier: Apache-2.0\n# Generated from the .proto files.\n")


class BuildWithStubs(build_py):
    def run(self):
        super().run()
        # Beside the modules gathered for the wheel; an editable install has them in the source tree, where git ignores them.
        out = HERE if self.editable_mode else pathlib.Path(self.build_lib)
        out.mkdir(parents=True, exist_ok=True)
        generate(proto_root(), out)


class SdistWithProtos(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        for proto in PROTOS:
            target = pathlib.Path(base_dir) / "proto" / proto
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(proto_root() / proto, target)


def dependencies():
    from importlib.metadata import version

    return [f"grpcio>={version('grpcio-tools')}", f"protobuf>={version('protobuf')}", "numpy>=1.23"]


setup(install_requires=dependencies(), cmdclass={"build_py": BuildWithStubs, "sdist": SdistWithProtos})
