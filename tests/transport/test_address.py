"""Only the loopback is an address."""

import pytest

from crowdmesh_jax.errors import AddressError
from crowdmesh_jax.transport.address import LoopbackAddress, parse_loopback


@pytest.mark.parametrize(
    ("text", "target"),
    [("127.0.0.1:50051", "ipv4:127.0.0.1:50051"), ("[::1]:50051", "ipv6:[::1]:50051")],
)
def test_the_loopback_round_trips(text, target):
    address = parse_loopback(text, dial=True)
    assert str(address) == text
    assert address.target == target
    assert parse_loopback(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("0.0.0.0:1", "[::]:1", "192.168.1.5:1", "10.0.0.1:1", "127.0.0.2:1", "localhost:1"),
        *("example.org:1", "[::ffff:127.0.0.1]:1", "[fe80::1]:1", "127.1:1", "2130706433:1"),
        *("unix:/tmp/x", "dns:///127.0.0.1:1", "ipv4:127.0.0.1:1", "127.0.0.1:1,10.0.0.1:1"),
        *("", ":1", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:+1"),
        *("127.0.0.1:65536", "127.0.0.1:99999999999999999999", "::1:80", "[::1:80", "127.0.0.1:1 "),
        *("127.0.0.1:\u0661", "[127.0.0.1:5", "[::1]", "127.0.0.1\n:1"),
    ],
)
@pytest.mark.parametrize("dial", [False, True])
def test_everything_else_is_refused(text, dial):
    with pytest.raises(AddressError, match="CM-402"):
        parse_loopback(text, dial=dial)


def test_port_0_means_any_free_one_and_cannot_be_dialled():
    assert parse_loopback("127.0.0.1:0") == LoopbackAddress("127.0.0.1", 0)
    with pytest.raises(AddressError, match="1 to 65535"):
        parse_loopback("127.0.0.1:0", dial=True)
