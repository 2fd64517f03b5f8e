// Compiled by tsc against the generated declarations, and run as it is written by Node.js once the types are gone.
//   node agent.js round-trip          stdin: bytes of a ConnectRequest; stdout: bytes of the same hello, made here
//   node agent.js connect URL         says hello, prints the welcome and the refusal that ends the RPC as JSON
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { ConnectRequestSchema, ControlService, Protection } from "./fedloom/v1/control_pb.js";
import type { ConnectRequest } from "./fedloom/v1/control_pb.js";
import { Reason, RefusalDetailsSchema } from "./fedloom/v1/refusal_pb.js";

function hello(): ConnectRequest {
  const publicKey = Uint8Array.from({ length: 32 }, (_, i) => i * 8);
  return create(ConnectRequestSchema, {
    step: {
      case: "hello",
      value: {
        protocolVersion: 1,
        software: "fedloom é 0.1",
        protections: [Protection.ENCRYPTED, Protection.PLAIN],
        exchangeKey: { publicKey },
      },
    },
  });
}

async function roundTrip(): Promise<void> {
  const parts: Uint8Array[] = [];
  for await (const part of process.stdin) parts.push(part as Uint8Array);
  const received = fromBinary(ConnectRequestSchema, Buffer.concat(parts));
  if (received.step.case !== "hello") throw new Error(`expected hello, found ${received.step.case}`);
  const { software, protections, exchangeKey } = received.step.value;
  if (software !== "fedloom é 0.1" || protections.length !== 2) throw new Error("another hello");
  if (exchangeKey?.publicKey[31] !== 248) throw new Error("another key");
  process.stdout.write(toBinary(ConnectRequestSchema, hello()));
}

async function connect(baseUrl: string): Promise<void> {
  const client = createClient(ControlService, createGrpcTransport({ baseUrl }));
  let answered: (() => void) | undefined;
  const untilAnswered = new Promise<void>((resolve) => (answered = resolve));
  async function* steps(): AsyncGenerator<ConnectRequest> {
    yield hello();
    await untilAnswered; // the stream stays open both ways until the coordinator has spoken
    yield create(ConnectRequestSchema, { step: { case: "heartbeat", value: { progress: 0.5 } } });
  }
  const found: Record<string, unknown> = {};
  try {
    for await (const response of client.connect(steps())) {
      if (response.step.case === "welcome") {
        found["version"] = response.step.value.protocolVersion;
        found["interval"] = Number(response.step.value.heartbeatInterval?.seconds);
        answered?.();
      }
    }
  } catch (error) {
    const failure = ConnectError.from(error);
    const [details] = failure.findDetails(RefusalDetailsSchema);
    found["code"] = Code[failure.code];
    found["reason"] = details && Reason[details.reason];
    found["subject"] = details?.subject;
  }
  console.log(JSON.stringify(found));
}

const [command, url] = process.argv.slice(2);
await (command === "connect" && url ? connect(url) : roundTrip());
