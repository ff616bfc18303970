"""The gRPC face: answers, statuses, health, reflection, cancellation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

from .replica import Replica

SERVICE = "arriero.inference.v1.Inference"
S = pb.SamplingParameters


@pytest.fixture
def channel(replica: Replica) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(replica.target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


def user(text: str, **more: Any) -> pb.Conversation:
    return pb.Conversation(messages=[pb.ChatMessage(role="user", content=text)], **more)


def test_generate(stub: Any, replica: Replica) -> None:
    responses = list(stub.Generate(pb.GenerateRequest(text="hello 😀 world")))
    assert "".join(response.text for response in responses) == "hello 😀 world"
    assert [response.finish_reason for response in responses[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (
        len(responses) - 1
    )
    last = responses[-1]
    assert (last.finish_reason, last.stop) == (pb.FINISH_REASON_STOP, "<|eot|>")
    assert last.usage.prompt_tokens == len(replica.engine.submitted[-1].prompt)
    assert last.usage.completion_tokens == 8
    assert last.usage.cached_tokens == last.usage.prompt_tokens // 2
    assert replica.engine.submitted[-1].sampling.max_tokens == 2048 - last.usage.prompt_tokens


def test_generate_from_ids_and_conversations(stub: Any, replica: Replica) -> None:
    ids = stub.Tokenize(pb.TokenizeRequest(text="xyz")).ids
    echoed = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), echo=True))
    assert "".join(response.text for response in echoed) == "<|bos|>xyzxyz"
    tools = [json.dumps({"type": "function", "function": {"name": "f"}})]
    talk = stub.Generate(pb.GenerateRequest(conversation=user("hi", tools_json=tools)))
    assert "".join(response.text for response in talk) == "hi"
    prompt = replica.front.service.tokenizer.decode(replica.engine.submitted[-1].prompt)
    assert '"name": "f"' in prompt
    assert prompt.endswith("<|assistant|>")
    going_on = user("hi")
    going_on.messages.add(role="assistant", content="so far")
    going_on.continue_final_message = True
    list(stub.Generate(pb.GenerateRequest(conversation=going_on)))
    assert replica.front.service.tokenizer.decode(replica.engine.submitted[-1].prompt).endswith("so far")


def test_sampling(stub: Any, replica: Replica) -> None:
    sampling = S(n=3, seed=4, temperature=0.5, top_k=3, logit_bias={7: 1.5}, logprobs=2, prompt_logprobs=1)
    responses = list(stub.Generate(pb.GenerateRequest(text="ab", sampling=sampling, priority=2, cache_salt="s")))
    texts = ["", "", ""]
    for response in responses:
        texts[response.index] += response.text
    assert texts == ["4ab", "5ab", "6ab"]
    request = replica.engine.submitted[-1]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.logit_bias) == (0.5, 3, {7: 1.5})
    assert (request.priority, request.cache_salt) == (2, "s")
    assert sum(response.HasField("usage") for response in responses) == 1
    assert responses[-1].HasField("usage")
    first = next(response for response in responses if response.index == 0)
    assert [len(entry.top) for entry in first.logprobs] == [2]
    assert [entry.text for entry in first.prompt_logprobs] == ["a", "b"]
    assert first.logprobs[0].rank == 1
    list(stub.Generate(pb.GenerateRequest(text="ab", queue_timeout_seconds=1.5)))
    assert replica.engine.submitted[-1].queue_timeout == 1.5
    stopped = list(stub.Generate(pb.GenerateRequest(text="one two three", sampling=S(stop=["two"]))))
    assert (stopped[-1].stop, "".join(r.text for r in stopped)) == ("two", "one ")
    cut = list(stub.Generate(pb.GenerateRequest(text="one two", sampling=S(max_tokens=1))))
    assert cut[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_tokenize_and_get_model(stub: Any) -> None:
    with_bos = stub.Tokenize(pb.TokenizeRequest(text="hello", model="tiny"))
    assert with_bos.max_context == 2048
    assert list(with_bos.ids[1:]) == list(stub.Tokenize(pb.TokenizeRequest(text="hello", no_special_tokens=True)).ids)
    assert len(stub.Tokenize(pb.TokenizeRequest(conversation=user("hello"))).ids) > len(with_bos.ids)
    model = stub.GetModel(pb.GetModelRequest())
    assert list(model.names) == ["tiny", "org/tiny-alias"]
    assert (model.max_context, model.dtype, model.tensor, model.pipeline) == (2048, "float32", 1, 1)
    assert model.vocab_size > 256


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(text="a", sampling=S(temperature=-1)), "temperature"),
        (pb.GenerateRequest(text="a", sampling=S(temperature=float("nan"))), "temperature"),
        (pb.GenerateRequest(text="a", sampling=S(top_p=float("inf"))), "top_p"),
        (pb.GenerateRequest(text="a", sampling=S(top_p=0)), "top_p"),
        (pb.GenerateRequest(text="a", sampling=S(n=0)), "n"),
        (pb.GenerateRequest(text="a", sampling=S(n=4_000_000_000)), "n"),
        (pb.GenerateRequest(text="a", sampling=S(max_tokens=0)), "max_tokens"),
        (pb.GenerateRequest(text="a", sampling=S(max_tokens=4_000_000_000)), "max_tokens"),
        (pb.GenerateRequest(text="a", sampling=S(logprobs=21)), "logprobs"),
        (pb.GenerateRequest(text="a", sampling=S(stop=[""])), "stop"),
        (pb.GenerateRequest(text="a", sampling=S(logit_bias={4_000_000_000: 1})), "logit_bias"),
        (pb.GenerateRequest(text="a", sampling=S(logit_bias={1: float("nan")})), "logit_bias"),
        (pb.GenerateRequest(text="a", queue_timeout_seconds=float("nan")), "queue_timeout_seconds"),
        (pb.GenerateRequest(text="a", cache_salt="s" * 300), "cache_salt"),
        (pb.GenerateRequest(text="one " * 100_000), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4_000_000_000])), "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2048)), "token_ids"),
        (pb.GenerateRequest(conversation=pb.Conversation()), "conversation.messages"),
        (pb.GenerateRequest(conversation=pb.Conversation(messages=[pb.ChatMessage(role="x")])), "role"),
        (pb.GenerateRequest(conversation=user("a", tools_json=["["])), "tools_json"),
        (pb.GenerateRequest(conversation=user("a", tools_json=["[" * 100_000])), "tools_json"),
        (pb.TokenizeRequest(), "input"),
    ],
)
def test_a_bad_field_is_named(stub: Any, request_: Any, word: str) -> None:
    call = stub.Tokenize if isinstance(request_, pb.TokenizeRequest) else lambda request: list(stub.Generate(request))
    with pytest.raises(grpc.RpcError) as error:
        call(request_)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert word in error.value.details()


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        ("invalid", grpc.StatusCode.INVALID_ARGUMENT),
        ("too_long", grpc.StatusCode.INVALID_ARGUMENT),
        ("queue_full", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("draining", grpc.StatusCode.UNAVAILABLE),
        ("not_ready", grpc.StatusCode.UNAVAILABLE),
        ("timeout", grpc.StatusCode.DEADLINE_EXCEEDED),
        ("internal", grpc.StatusCode.INTERNAL),
    ],
)
def test_the_engines_refusals(stub: Any, replica: Replica, refusal: Any, code: grpc.StatusCode) -> None:
    replica.engine.refuse = (refusal, "because")
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Generate(pb.GenerateRequest(text="a")))
    assert (error.value.code(), error.value.details()) == (code, "because")
    if refusal == "queue_full":
        assert ("retry-after", "7") in [tuple(entry) for entry in error.value.trailing_metadata()]


def test_unknown_models(stub: Any) -> None:
    for call in (
        lambda: list(stub.Generate(pb.GenerateRequest(model="x", text="a"))),
        lambda: stub.Tokenize(pb.TokenizeRequest(model="x", text="a")),
        lambda: stub.GetModel(pb.GetModelRequest(model="x")),
    ):
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_cancelled_call_ends_its_sequences(stub: Any, replica: Replica) -> None:
    replica.call(lambda: replica.engine.hold(3))
    call = stub.Generate(pb.GenerateRequest(text="one two three four", sampling=S(n=2)))
    assert next(call).text
    assert len(replica.engine.running) == 2
    call.cancel()
    replica.wait_for(lambda: not replica.engine.running)
    assert set(replica.engine.aborted[-2:]) == {request.id for request in replica.engine.submitted[-2:]}
    replica.wait_for(lambda: replica.front.grpc.busy == 0)
    held = stub.Generate(pb.GenerateRequest(text="one two"), timeout=0.2)
    with pytest.raises(grpc.RpcError):
        next(held)
    replica.wait_for(lambda: not replica.engine.running)


def test_health(channel: grpc.Channel, replica: Replica) -> None:
    health = health_pb2_grpc.HealthStub(channel)

    def status(service: str) -> int:
        return int(health.Check(health_pb2.HealthCheckRequest(service=service)).status)

    assert status("") == status(SERVICE) == health_pb2.HealthCheckResponse.SERVING
    replica.call(lambda: replica.engine.set_phase("Joining"))
    replica.wait_for(lambda: status("") == status(SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING)
    replica.call(lambda: replica.engine.set_phase("Serving"))
    replica.wait_for(lambda: status("") == health_pb2.HealthCheckResponse.SERVING)
    with pytest.raises(grpc.RpcError) as error:
        status("other")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest
    answers = list(
        stub.ServerReflectionInfo(iter([request(list_services=""), request(file_containing_symbol=SERVICE)]))
    )
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "arriero.inference.v1.Prefixes", "grpc.health.v1.Health"} <= names
    file = descriptor_pb2.FileDescriptorProto.FromString(answers[1].file_descriptor_response.file_descriptor_proto[0])
    assert [service.name for service in file.service] == ["Inference"]
