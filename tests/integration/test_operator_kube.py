"""The port's adapter and what stands directly on it (the CA's Secret, the resync), in this process, on a real API server."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kubernetes.aio.client import Configuration

from finetune_operator.control import tls
from finetune_operator.kube import aio, port
from finetune_operator.kube.aio import AioCluster, load_configuration
from finetune_operator.kube.port import SECRETS, Resource
from testcluster import Cluster

CONFIG_MAPS = Resource("", "v1", "configmaps")
CHILDREN = port.CHILDREN

Calls = list[tuple[str, str, str]]


@pytest.fixture
async def calls() -> Calls:
    return []


@pytest.fixture
async def api(cluster: Cluster, calls: Calls) -> AsyncIterator[AioCluster]:
    client = AioCluster(await load_configuration(cluster.kubeconfig), lambda *call: calls.append(call))
    yield client
    await client.close()


def config_map(name: str, **data: str) -> port.Object:
    return {"metadata": {"name": name, "labels": {"test": "yes"}}, "data": data}


async def test_create_get_patch_delete(api: AioCluster, namespace: str, calls: Calls) -> None:
    made = await api.create(CONFIG_MAPS, namespace, config_map("a", kept="1", gone="2"))
    version = made["metadata"]["resourceVersion"]
    patch = {"metadata": {"resourceVersion": version}, "data": {"gone": None, "new": "3"}}
    changed = await api.patch(CONFIG_MAPS, namespace, "a", patch)
    assert changed["data"] == {"kept": "1", "new": "3"}, "it must go out as a merge patch"
    assert (await api.get(CONFIG_MAPS, namespace, "a"))["data"] == changed["data"]
    await api.delete(CONFIG_MAPS, namespace, "a", made["metadata"]["uid"])
    with pytest.raises(port.NotFound):
        await api.get(CONFIG_MAPS, namespace, "a")
    assert calls == [
        ("POST", "configmaps", "201"),
        ("PATCH", "configmaps", "200"),
        ("GET", "configmaps", "200"),
        ("DELETE", "configmaps", "200"),
        ("GET", "configmaps", "404"),
    ]


async def test_writes_onto_another_version_or_object_are_conflicts(api: AioCluster, namespace: str) -> None:
    made = await api.create(CONFIG_MAPS, namespace, config_map("a"))
    with pytest.raises(port.AlreadyExists):
        await api.create(CONFIG_MAPS, namespace, config_map("a"))
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"x": "1"}}
    await api.patch(CONFIG_MAPS, namespace, "a", stale)
    with pytest.raises(port.Conflict):
        await api.patch(CONFIG_MAPS, namespace, "a", {**stale, "data": {"x": "2"}})
    with pytest.raises(port.Conflict):
        await api.delete(CONFIG_MAPS, namespace, "a", "00000000-0000-0000-0000-000000000000")
    assert (await api.get(CONFIG_MAPS, namespace, "a"))["data"] == {"x": "1"}


async def test_a_refusal_carries_the_api_servers_sentence(api: AioCluster, namespace: str) -> None:
    with pytest.raises(port.Refused, match="must not contain|lowercase RFC 1123"):
        await api.create(CONFIG_MAPS, namespace, config_map("Not A Name"))
    quotas, hard = Resource("", "v1", "resourcequotas"), {"count/configmaps": "0"}
    await api.create(quotas, namespace, {"metadata": {"name": "none"}, "spec": {"hard": hard}})
    # The test cluster has no quota controller, which would count what is there.
    await api.patch(quotas, namespace, "none", {"status": {"hard": hard, "used": hard}}, subresource="status")

    async def create_until_refused() -> None:
        for number in range(200):  # admission reads quotas through a watch, a moment late
            await api.create(CONFIG_MAPS, namespace, config_map(f"one-too-many-{number}"))
            await asyncio.sleep(0.1)

    with pytest.raises(port.Refused) as refused:
        await create_until_refused()
    assert (refused.value.status, refused.value.reason) == (403, "Forbidden")
    assert "exceeded quota: none" in refused.value.message


async def test_lists_go_page_by_page_with_a_selector(
    api: AioCluster, namespace: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "PAGE", 2)
    for number in range(5):
        await api.create(CONFIG_MAPS, namespace, config_map(f"c-{number}"))
    calls.clear()
    found = [item["metadata"]["name"] async for item in api.list(CONFIG_MAPS, namespace, "test=yes")]
    assert found == [f"c-{number}" for number in range(5)]
    assert calls == [("LIST", "configmaps", "200")] * 3
    everywhere = [item["metadata"]["namespace"] async for item in api.list(CONFIG_MAPS, None, "test=yes")]
    assert everywhere.count(namespace) == 5


async def test_a_job_is_deleted_with_its_pods_and_not_without_them(api: AioCluster, namespace: str) -> None:
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}
    made = await api.create(CHILDREN, namespace, {"metadata": {"name": "j"}, "spec": {"template": {"spec": pod}}})

    async def pods() -> int:
        return len([p async for p in api.list(port.PODS, namespace, "batch.kubernetes.io/job-name=j")])

    async def until(count: int) -> None:
        for _ in range(200):
            if await pods() == count:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"not {count} pods")

    await until(1)
    await api.delete(CHILDREN, namespace, "j", made["metadata"]["uid"])
    await until(0)


async def test_no_answer_is_unavailable_and_is_counted(cluster: Cluster, calls: Calls) -> None:
    configuration = await load_configuration(cluster.kubeconfig)
    configuration.host = "https://127.0.0.1:1"
    client = AioCluster(configuration, lambda *call: calls.append(call))
    with pytest.raises(port.Unavailable, match="does not answer"):
        await client.discover("/version")
    await client.close()
    assert calls == [("GET", "discovery", "none")]


async def test_a_server_with_another_certificate_is_not_talked_to(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "ca.pem"
    other.write_bytes(tls.make_ca()[0])
    configuration = await load_configuration(cluster.kubeconfig)
    configuration.ssl_ca_cert = str(other)
    client = AioCluster(configuration)
    with pytest.raises(port.Unavailable, match="[Cc]ertificate"):
        await client.discover("/version")
    await client.close()


async def test_a_token_file_is_read_anew_when_it_changes(cluster: Cluster, tmp_path: Path) -> None:
    # What a ServiceAccount's projected token does every hour: the old one ends.
    config = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json").stdout)
    file = tmp_path / "token"
    file.write_text("wrong")
    config["users"][0]["user"] = {"tokenFile": str(file)}
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    client = AioCluster(await load_configuration(path))
    try:
        with pytest.raises(port.ApiError) as refused:
            await client.discover("/version")
        assert refused.value.status == 401
    finally:
        await client.close()
    file.write_text(cluster.kubectl("create", "token", "default").stdout.strip())
    fresh = AioCluster(await load_configuration(path))
    try:
        assert (await fresh.discover("/version"))["major"] == "1"
    finally:
        await fresh.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be used"),
        ("{}", "cannot be used"),
        ("a: [b", "cannot be used"),
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(port.ApiError, match=says) as refused:
        await load_configuration(path)
    assert str(path) in refused.value.message


async def test_operators_that_start_at_once_share_one_ca(api: AioCluster, namespace: str) -> None:
    await api.create(SECRETS, namespace, {"metadata": {"name": "progress"}, "type": "Opaque"})
    found = await asyncio.gather(*(tls.load_ca(api, namespace, "progress") for _ in range(6)))
    assert len(set(found)) == 1, "each would serve pods that do not trust it"
    assert await tls.load_ca(api, namespace, "progress") == found[0]
    assert isinstance(tls.own_identity(*found[0], ["progress"]).context, ssl.SSLContext)


async def test_without_the_secret_nothing_is_made(api: AioCluster, namespace: str) -> None:
    with pytest.raises(port.NotFound):
        await tls.load_ca(api, namespace, "nowhere")


def test_configuration_is_the_clients_own(cluster: Cluster) -> None:
    configuration = asyncio.run(load_configuration(cluster.kubeconfig))
    assert isinstance(configuration, Configuration)
    assert configuration.host == cluster.url
    assert configuration.verify_ssl
