"""gRPC streams whose payloads go from the memory they lie in to the socket, and from the socket
into the memory they belong in.

    views        memory in pieces, filled or sent from the front
    protocol     h2's side of a connection, and the frames that are packed by hand
    framing      bytes into frames
    reading      a stream's bytes into messages
    stream       one call: messages out, messages in
    sending      what leaves on a connection
    receiving    what comes on one
    connection   one HTTP/2 connection, either end
    server       a port and its methods
    client       connections to one peer

On the wire it is gRPC over HTTP/2, and any gRPC peer can be at the other end. grpc.aio copies a
message of 2 MiB three times on its way and reads it in pieces of 16 KiB, which costs more than the
network does; here the kernel copies it once on either side. `bench/handoff_cpu.py` compares.
"""
