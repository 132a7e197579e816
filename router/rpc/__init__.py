"""gRPC's server side over HTTP/2: messages leave in the loop's own thread, a connection's together.

    server       ports, methods, the end
    connection   one client's HTTP/2 connection: h2 for the protocol, DATA frames by hand
    call         one call: what a servicer method sees as its context
    inbox        a call's incoming messages, bounded by flow control
    headers      metadata, deadlines, statuses in their wire form
    outgoing     what leaves, in one write per turn of the loop
    opening      what a call's headers ask for
    alive        whether a silent client is still there
    abuse        what a peer may not do

grpc.aio pays for every message with a wake-up of its poller thread and one of the event loop; that
alone is more than a token may cost. `docs/hot-path.md` has the figures.
"""
