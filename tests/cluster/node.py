"""One node: containerd, kubelet and kube-proxy in its own network and mount namespace. Linux and root only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.cluster import cgroups, network, thin
from tests.cluster.control_plane import Find
from tests.cluster.credentials import Credentials
from tests.cluster.layout import Layout, NodeLayout
from tests.cluster.processes import Program, run, wait_until

CNI_PROGRAMS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
PAUSE_IMAGE = "arriero.test/pause:1"


class Node:
    """A node's programs; each can be killed and started again, and the node cut off and brought back."""

    def __init__(self, layout: Layout, node: NodeLayout, credentials: Credentials, find: Find) -> None:
        self.layout, self.place = layout, node
        self.name = node.name
        self.socket = node.home / "containerd.sock"
        self._files = node_files(layout, node, credentials)
        enter = network.enter(node)
        self.containerd = self._program(
            "containerd", ["containerd", f"--config={node.home / 'containerd.toml'}"], enter
        )
        self.kubelet = self._program(
            "kubelet",
            [
                str(find("kubelet")),
                f"--config={node.home / 'kubelet.json'}",
                f"--kubeconfig={credentials.kubeconfig(f'system:node:{node.name}')}",
                f"--root-dir={node.home / 'var-lib-kubelet'}",
                f"--cert-dir={node.home / 'pki'}",
                f"--hostname-override={node.name}",
                f"--node-ip={node.address}",
                f"--node-labels=arriero.test/node={node.number}",
            ],
            enter,
        )
        self.proxy = self._program(
            "kube-proxy",
            [str(find("kube-proxy")), f"--config={node.home / 'proxy.json'}", f"--hostname-override={node.name}"],
            enter,
        )

    def _program(self, name: str, command: Sequence[str], prefix: Sequence[str]) -> Program:
        return Program(f"{self.name}-{name}", command, self.layout.home, prefix=prefix)

    @property
    def programs(self) -> tuple[Program, ...]:
        return (self.containerd, self.kubelet, self.proxy)

    def prepare(self) -> None:
        """Namespaces, control group, configuration, and containerd, which then loads images."""
        self.place.home.mkdir(parents=True)
        network.create_node(self.layout, self.place)
        cgroups.create(self.place.cgroup)
        for path, text in self._files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        thin.write_runtime(self.place.home, self.layout.kernels)
        self.containerd.start()

    def start(self) -> None:
        """Start kubelet and kube-proxy, once containerd answers. The images of its sandboxes must be there."""
        self.wait_for_containerd()
        self.kubelet.start()
        self.proxy.start()

    def wait_for_containerd(self) -> None:
        wait_until(self._containerd_answers, f"containerd of {self.name}", 30.0, [self.containerd])

    def _containerd_answers(self) -> bool:
        return self.socket.exists() and "Server:" in self.ctr("version", check=False)

    def ctr(self, *arguments: str | Path, check: bool = True) -> str:
        """containerd's own client on this node, in the namespace of Kubernetes' containers."""
        command = [*network.enter(self.place), "ctr", f"--address={self.socket}", "--namespace=k8s.io"]
        return run(*command, *arguments, check=check)

    def load_image(self, archive: Path) -> None:
        """Make an image (a docker-archive tar) known to the node."""
        self.ctr("images", "import", archive)

    def cut(self) -> None:
        """Cut the node off: nobody reaches it, it reaches nobody, and its pods run on."""
        network.cut(self.place)

    def mend(self) -> None:
        network.mend(self.place)


def node_files(layout: Layout, node: NodeLayout, credentials: Credentials) -> dict[Path, str]:
    """The node's configuration files: path -> text."""
    return {
        node.home / "containerd.toml": containerd_config(node),
        node.home / "cni" / "10-arriero.conflist": json.dumps(cni_config(layout, node)),
        node.home / "kubelet.json": json.dumps(kubelet_config(layout, node, credentials)),
        node.home / "proxy.json": json.dumps(proxy_config(layout, credentials)),
    }


def snapshotter(place: Path) -> str:
    """overlayfs, except where the folder itself lies on one: the kernel does not stack them for writing."""
    kind = run("stat", "--file-system", "--format=%T", place).strip()
    return "native" if kind == "overlayfs" else "overlayfs"


def containerd_config(node: NodeLayout) -> str:
    existing = [parent for parent in node.home.parents if parent.exists()]
    programs = next((str(path) for path in CNI_PROGRAMS if path.exists()), str(CNI_PROGRAMS[0]))
    return f"""
version = 2
root = "{node.home}/containerd"
state = "{node.home}/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
address = "{node.home}/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "{node.home}/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
stream_server_address = "{node.address}"
netns_mounts_under_state_dir = true
# Where the machine's root lacks CAP_SYS_RESOURCE, no process may be made less likely to be killed than its parent.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{programs}"
conf_dir = "{node.home}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter(existing[0])}"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{node.home}/runc"
SystemdCgroup = false
"""


def cni_config(layout: Layout, node: NodeLayout) -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": node.pod_cidr}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(node.home / "addresses"),
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipMasq": False}
    return {
        "cniVersion": "1.0.0",
        "name": layout.name,
        "plugins": [{**bridge, "ipam": addresses}, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def kubelet_config(layout: Layout, node: NodeLayout, credentials: Credentials) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "authentication": {
            "x509": {"clientCAFile": str(credentials.authority)},
            "webhook": {"enabled": True},
            "anonymous": {"enabled": False},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{node.home}/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": False,
        "makeIPTablesUtilChains": False,
        # The nodes share the machine's disk and memory with everything else: no eviction by their figures.
        "evictionHard": {},
        "imageGCHighThresholdPercent": 100,
        "clusterDomain": "cluster.local",
        "clusterDNS": [layout.address],
        "resolvConf": "",
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": 12,
        "nodeStatusReportFrequency": "10s",
        "syncFrequency": "10s",
        "maxPods": 200,
    }


def proxy_config(layout: Layout, credentials: Credentials) -> dict[str, object]:
    unchanged = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(credentials.kubeconfig("system:kube-proxy"))},
        "mode": "nftables",
        "clusterCIDR": layout.pod_cidr,
        "nftables": {"syncPeriod": "10s", "minSyncPeriod": "0.1s"},
        "conntrack": {**unchanged, "udpTimeout": "0s", "udpStreamTimeout": "0s"},
    }
