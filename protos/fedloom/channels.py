"""How connections are kept alive, on both sides, so that neither trips over the other.

A client pings a connection that has been silent for 30 s and gives it up 20 s later; the server
permits pings every 10 s, also between calls, so that "too many pings" cannot happen. NAT boxes
forget silent connections after one to five minutes. gRPC's 4 MiB message limit stays.

A stream's window is fixed: gRPC would let it grow to megabytes, and a coordinator holds one for
every agent that uploads. It bounds a stream to 512 KiB per round trip: 10 MB/s at 50 ms.
"""

ChannelOptions = list[tuple[str, int | str]]

_WINDOW: ChannelOptions = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 19),
]

CLIENT_OPTIONS: ChannelOptions = [
    *_WINDOW,
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 30_000),
]

SERVER_OPTIONS: ChannelOptions = [
    *_WINDOW,
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]
