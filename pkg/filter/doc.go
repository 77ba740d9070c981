// Package filter compiles expressions in pcap-filter syntax ("tcp port 443
// and not host 10.0.0.1") to an eBPF function that decides over the headers of
// one packet, which the BPF side has parsed into a struct pkt_tuple (see
// Tuple).
//
// An expression that is accepted means what libpcap 1.10.3 makes of it on an
// Ethernet link; a test compares the two. What cannot be answered from the
// tuple, and so could only be answered differently, is refused by Parse.
//
// # Language
//
//	host A, net N, net N/LEN, net N mask M   A, N: IPv4, IPv6, partial IPv4 (10.1)
//	port P, portrange P-P                    P: a number or a name that this package knows
//	  each after src, dst, src or dst, src and dst
//	  and after ip, arp, rarp, ip6 (addresses) or tcp, udp, sctp (ports)
//	ether host MAC, ether src MAC, ether dst MAC
//	ip, ip6, arp, rarp, tcp, udp, sctp, icmp, icmp6, igmp, pim, vrrp, carp, ah, esp
//	proto N, ip proto N, ip6 proto N, ether proto N
//	                                         N: a number or a name; \tcp where the name is a keyword
//	vlan, vlan ID
//	less N, greater N, len OP N              bytes of the frame with its Ethernet header
//	tcp[13], tcp[tcpflags], icmp[0], icmp[icmptype], icmp[1], icmp[icmpcode],
//	icmp6[0], icmp6[icmp6type], icmp6[1], icmp6[icmp6code]
//	  compared by = == != < <= > >= with a constant, after & | << >> + - * /
//	  with constants
//	and &&, or ||, not !, ( )
//
// As in libpcap, and and or bind equally and to the left, and a value takes the
// qualifiers of the primitive before it ("tcp port 80 or 443").
//
// Host names are not resolved. Port and protocol names come from tables inside
// the package, which say what /etc/services and /etc/protocols of Debian 12
// say; so a name that is tcp only there ("port http") is tcp only here, as with
// libpcap.
//
// # VLAN
//
// libpcap sees the tag inside the frame, so before vlan every protocol test is
// false for a tagged frame, and from vlan on the rest of the expression, in
// reading order, looks behind the tag. That is mirrored here although the
// kernel keeps the tag beside the packet. Where libpcap would look behind a tag
// that is not there ("vlan or ip", "not vlan and ip") Parse refuses the
// expression, and so it does for a second vlan, which would look for a tag
// behind the first one.
//
// # What the kernel has taken off
//
// Before the first hook the kernel cuts off the padding of short frames, which len, less and
// greater count at a device's tap, and it takes off the tag of VLAN 0, so that at PREROUTING
// udp matches such a packet and vlan does not.
//
// # Imports
//
// Of what is not in the standard library, the package may import
// cilium/ebpf/asm only, its tests golang.org/x/net/bpf as well. They need
// neither root nor a kernel.
package filter
