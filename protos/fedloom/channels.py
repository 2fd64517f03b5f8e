"""How connections are kept alive and bounded, on both sides, so that neither trips over the other.

Alive: whoever has heard nothing for 30 s sends a ping and gives the connection up when 20 s later
nothing has come back; so both sides notice within 50 s that a connection is half-open. NAT boxes
forget silent connections after one to five minutes. A server takes two pings a second for good
manners, with or without calls ("too many pings" answers a flood, not a client that is in a hurry).

Bounded: gRPC's 4 MiB limit for a message and 16 KiB limit for metadata stay. A stream's window is
fixed: gRPC would let it grow to megabytes, and a coordinator holds one for every agent that
uploads. Downloads have 512 KiB per round trip (10 MB/s at 50 ms), uploads 128 KiB (2.6 MB/s): on a
slow link the window lies in the agent's kernel and modem, in front of its next ping, and gRPC opens
it again, which is the sign of life, when half of it was read: 8 s at 64 kbit/s. With 512 KiB it was
half a minute, the ping waited for another one, and links that worked were cut.

What waits, and for how long. Nothing else does: no transfer has an end by which it must be done.

| who | waits for | at most | and then |
|---|---|---|---|
| both | a sign of life | 30 s, ping, 20 s | cut: the agent connects again |
| agent | one attempt to connect, TLS included | 20 s | the next attempt |
| agent | between attempts and after a cut | 0.2 s to 30 s, or `retry_after` | an attempt |
| agent | the answer to Enrol or Renew | 30 s | fails; a repeat is safe |
| agent | a person at an offline authority | a week, if need be | asks again, 1 s to 60 s apart |
| coordinator | TLS and HTTP/2 settings of a new connection | 20 s | closes it |
| coordinator | the first call of a connection, or the next | 2 min (enrolment: 20 s) | closes it |
| coordinator | `hello` of a control stream | 20 s | refuses, MALFORMED |
| coordinator | the next part of an upload | 10 min | refuses, MALFORMED |
| coordinator | the run key, from the agent that shall wrap it | 60 s | asks another one |
| coordinator | its own end: updates that are here, open calls | 30 s, 2 s | ends |
| coordinator | a connection's age | 12 h (enrolment: 1 min) | GOAWAY; cuts 10 min (10 s) later |
| coordinator | a phase of a round | `[deadlines]` of run.toml | goes on without the missing |

The age exists for a peer that answers pings and reads nothing: gRPC has no other way to end a call
that is blocked in a write.
"""

from typing import Final

ChannelOptions = list[tuple[str, int | str]]
WINDOW_BYTES: Final = 1 << 19  # of what a client receives
UPLOAD_WINDOW_BYTES: Final = 1 << 17  # of what a server receives
ENROLMENT_MESSAGE_BYTES: Final = 1 << 16  # a signing request with its secret needs 1 KiB

KEEPALIVE: ChannelOptions = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # what TCP waits for: that the network acknowledges
    ("grpc.http2.ping_timeout_ms", 20_000),  # that the peer answers: a middlebox acknowledges too
    ("grpc.keepalive_permit_without_calls", 1),
]

CLIENT_OPTIONS: ChannelOptions = [
    *KEEPALIVE,
    ("grpc.http2.bdp_probe", 0),  # it would let the window grow
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
    # Its name misleads: it is how long an attempt to connect may take, TLS included. Less than the
    # default leaves a far or slow coordinator out of reach.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 30_000),
]

_ANY_SERVER: ChannelOptions = [
    *KEEPALIVE,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", UPLOAD_WINDOW_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 30),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),
]

# Operators may watch a run for days.
ADMIN_SERVER_OPTIONS: ChannelOptions = [
    *_ANY_SERVER,
    ("grpc.max_concurrent_streams", 16),  # on a connection: more of its calls wait at the client
    ("grpc.max_connection_idle_ms", 120_000),
]

SERVER_OPTIONS: ChannelOptions = [
    *ADMIN_SERVER_OPTIONS,
    ("grpc.max_connection_age_ms", 12 * 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
]

# Anybody may call there: one small call, and nobody stays.
ENROLMENT_SERVER_OPTIONS: ChannelOptions = [
    *_ANY_SERVER,
    ("grpc.max_concurrent_streams", 1),
    ("grpc.max_receive_message_length", ENROLMENT_MESSAGE_BYTES),
    ("grpc.max_connection_idle_ms", 20_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
]
