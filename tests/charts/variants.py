"""Values that between them reach every line of the chart's templates."""

from __future__ import annotations

from typing import Any

NAMESPACE = "arriero-system"
SERVED = ("llamas", "more-llamas")
"""Namespaces of the variants that do not serve the whole cluster."""
MONITORING = {
    "namespace": "monitoring",
    "labels": {"release": "prometheus"},
    "interval": "30s",
    "serviceMonitor": {"enabled": True},
    "podMonitors": {"enabled": True},
    "dashboard": {"enabled": True},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one replica": {"operator": {"replicas": 1}},
    "private registry": {
        "images": {
            "registry": "registry.example:5000/team",
            "tag": "1.2.3",
            "pullPolicy": "Always",
            "pullSecrets": ["pull", "other"],
            "router": {"tag": "1.2.4"},
            "worker": {"digest": "sha256:" + "0123456789abcdef" * 4},
        }
    },
    "some namespaces": {"operator": {"watchNamespaces": list(SERVED)}},
    "monitoring": {"monitoring": MONITORING},
    "monitoring of some namespaces": {
        "monitoring": {
            **MONITORING,
            "dashboard": {"enabled": True, "namespace": SERVED[0], "labels": {"grafana": "yes"}},
        },
        "operator": {"watchNamespaces": [SERVED[0]]},
    },
    "the least": {
        "operator": {"replicas": 1, "resources": {"requests": None, "limits": None}},
        "crd": {"install": False},
        "serviceAccount": {"create": False, "name": "somebody"},
        "rbac": {"create": False, "aggregate": False},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
    "no account of its own": {"serviceAccount": {"create": False}, "crd": {"keep": False}},
    "where it runs": {
        "operator": {
            "replicas": 3,
            "clusterDomain": "cluster.local",
            "lostSeconds": 7.5,
            "bindSeconds": 30,
            "patienceSeconds": 600,
            "unreadySeconds": 240,
            "resources": {"limits": {"cpu": 2}},
            "podLabels": {"team": "llamas"},
            "podAnnotations": {"note": "yes"},
            "nodeSelector": {"pool": "system"},
            "tolerations": [{"key": "CriticalAddonsOnly", "operator": "Exists"}],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "pool", "operator": "Exists"}]}]
                    }
                }
            },
            "priorityClassName": "system-cluster-critical",
            "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/etc/authority/ca.crt"}],
            "extraVolumes": [{"name": "authority", "configMap": {"name": "authority", "optional": True}}],
            "extraVolumeMounts": [{"name": "authority", "mountPath": "/etc/authority", "readOnly": True}],
        },
        "serviceAccount": {"name": "arriero", "annotations": {"note": "yes"}},
    },
}
