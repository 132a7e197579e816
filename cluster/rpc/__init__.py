"""gRPC over HTTP/2, both ends: messages leave in the loop's own thread, a connection's together.

    endpoint     one HTTP/2 connection, either end of it: h2 for the protocol, DATA frames by hand
    server       ports, methods, the end
    connection   one client's connection, at the server
    call         one call: what a servicer method sees as its context
    client       a connection to a server, and the calls on it
    plain_data   DATA frames that come, taken past h2
    known_blocks headers of calls that came before, likewise
    sending      a call's messages on their way out
    inbox        a call's incoming messages, bounded by flow control
    headers      metadata, deadlines, statuses in their wire form
    outgoing     what leaves, in one write per turn of the loop
    opening      what a call's headers ask for
    alive        whether a silent client is still there
    abuse        what a peer may not do

grpc.aio pays for every message with a wake-up of its poller thread and one of the event loop; that
alone is more than a token may cost. `docs/hot-path.md` has the figures.
"""
