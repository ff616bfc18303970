"""etcd, the API server, the controller manager and the scheduler of a cluster, on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cluster.api import Api
from tests.cluster.credentials import Credentials
from tests.cluster.layout import Layout
from tests.cluster.processes import Program, wait_until

Find = Callable[[str], Path]


class ControlPlane:
    """Four programs; any of them can be killed and started again while the others run."""

    def __init__(self, layout: Layout, credentials: Credentials, find: Find) -> None:
        self.layout = layout
        self.etcd = Program("etcd", etcd_command(layout, find("etcd")), layout.home)
        self.api_server = Program(
            "kube-apiserver", api_server_command(layout, credentials, find("kube-apiserver")), layout.home
        )
        self.controller_manager = Program(
            "kube-controller-manager",
            controller_manager_command(layout, credentials, find("kube-controller-manager")),
            layout.home,
        )
        self.scheduler = Program(
            "kube-scheduler", scheduler_command(layout, credentials, find("kube-scheduler")), layout.home
        )

    @property
    def programs(self) -> tuple[Program, ...]:
        return (self.etcd, self.api_server, self.controller_manager, self.scheduler)

    def wait(self, api: Api, timeout: float = 90.0) -> None:
        """Wait until the API server is ready. Raises ClusterError."""
        wait_until(api.is_ready, "ready API server", timeout, self.programs[:2])


def etcd_command(layout: Layout, program: Path) -> list[str]:
    peers = f"http://{layout.local}:2380"
    return [
        str(program),
        "--name=arriero",
        f"--data-dir={layout.home / 'etcd'}",
        f"--listen-client-urls=http://{layout.local}:2379",
        f"--advertise-client-urls=http://{layout.local}:2379",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=arriero={peers}",
        "--unsafe-no-fsync",  # a test's cluster need not survive the machine
        "--log-level=warn",
    ]


def api_server_command(layout: Layout, credentials: Credentials, program: Path) -> list[str]:
    accounts = credentials.key("accounts")
    return [
        str(program),
        f"--etcd-servers=http://{layout.local}:2379",
        f"--bind-address={layout.address}",
        f"--advertise-address={layout.address}",
        "--secure-port=6443",
        f"--tls-cert-file={credentials.certificate('server')}",
        f"--tls-private-key-file={credentials.key('server')}",
        f"--client-ca-file={credentials.authority}",
        f"--token-auth-file={credentials.token_file}",
        f"--kubelet-client-certificate={credentials.certificate('kubelet-client')}",
        f"--kubelet-client-key={credentials.key('kubelet-client')}",
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--service-cluster-ip-range={layout.service_cidr}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={accounts}",
        f"--service-account-signing-key-file={accounts}",
        "--profiling=false",
    ]


def controller_manager_command(layout: Layout, credentials: Credentials, program: Path) -> list[str]:
    return [
        str(program),
        f"--kubeconfig={credentials.kubeconfig('system:kube-controller-manager')}",
        f"--bind-address={layout.local}",
        f"--root-ca-file={credentials.authority}",
        f"--service-account-private-key-file={credentials.key('accounts')}",
        f"--cert-dir={layout.home / 'controller-manager'}",
        "--use-service-account-credentials=true",
        # Its own limits are for clusters with other things to do: dozens of deployments at once take minutes then.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--allocate-node-cidrs=false",  # each node's pod addresses follow from its number
        # Half of the defaults: a test waits for it. With kubelets that renew their lease every 3 s.
        "--node-monitor-period=2s",
        "--node-monitor-grace-period=20s",
        "--leader-elect=false",
    ]


def scheduler_command(layout: Layout, credentials: Credentials, program: Path) -> list[str]:
    return [
        str(program),
        f"--kubeconfig={credentials.kubeconfig('system:kube-scheduler')}",
        f"--bind-address={layout.local}",
        f"--cert-dir={layout.home / 'scheduler'}",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--leader-elect=false",
    ]
