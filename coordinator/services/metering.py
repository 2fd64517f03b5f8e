"""Counts every call at the border: bytes, endings and refusals, without a line in the services."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import lru_cache
from typing import Any

import grpc

from coordinator.metrics import Metrics, Side
from coordinator.services.access import METHODS
from fedloom.errors import Reason
from fedloom.v1 import control_pb2

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Metering(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all services, which must be coroutines or asynchronous generators."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        # Methods are few: what is made for each call is held by each idle agent.
        self._metered = lru_cache(METHODS)(self._meter)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the method's handler, metered; None for a method that nobody serves."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._metrics.rpcs.labels("unknown", "refused").inc()
            return None
        return self._metered(handler, handler_call_details.method)

    def _meter(self, handler: Any, method: str) -> Any:
        service, rpc = method.removeprefix("/").split("/")
        service = service.rpartition(".")[2]
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, make.__name__.removesuffix("_rpc_method_handler"))
        return make(
            self._watched(behaviour, f"{service}/{rpc}"),
            request_deserializer=self._receiving(handler.request_deserializer, service),
            response_serializer=self._sending(handler.response_serializer, service),
        )

    # bytes, where they are made into messages: nothing is added to a stream's path

    def _receiving(self, parse: Callable[[bytes], Any], service: str) -> Callable[[bytes], Any]:
        count = self._metrics.received_bytes.labels(service).inc

        def parse_and_count(data: bytes) -> Any:
            count(len(data))
            message = parse(data)
            if isinstance(message, control_pb2.ConnectRequest) and message.HasField("refusal"):
                self._metrics.refused(Side.AGENT, message.refusal.details.reason)
            return message

        return parse_and_count

    def _sending(self, write: Callable[[Any], bytes], service: str) -> Callable[[Any], bytes]:
        count = self._metrics.sent_bytes.labels(service).inc

        def write_and_count(message: Any) -> bytes:
            if isinstance(message, control_pb2.ConnectResponse) and message.HasField("refusal"):
                self._metrics.refused(Side.COORDINATOR, message.refusal.details.reason)
            data = write(message)
            count(len(data))
            return data

        return write_and_count

    # endings

    def _watched(self, behaviour: Callable[..., Any], rpc: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._call(rpc, context):
                    async with aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            yield response

            return stream

        async def answer(request: Any, context: Any) -> Any:
            with self._call(rpc, context):
                return await behaviour(request, context)

        return answer

    @contextmanager
    def _call(self, rpc: str, context: Any) -> Iterator[None]:
        outcome = "ok"
        with self._metrics.open_rpcs.labels(rpc).track_inprogress():
            try:
                yield
            except grpc.aio.AbortError:
                outcome = "refused"
                # `refusing` ends a call with the name of its reason as the details
                self._metrics.refused(Side.COORDINATOR, _REASONS.get(context.details(), 0))
                raise
            except (asyncio.CancelledError, GeneratorExit):
                outcome = "cancelled"
                raise
            except BaseException:
                outcome = "failed"
                raise
            finally:
                self._metrics.rpcs.labels(rpc, outcome).inc()


_REASONS: dict[str, int] = {reason.name: reason.value for reason in Reason}
_MAKERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
