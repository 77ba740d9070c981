package render

// Protocol numbers and extension headers (include/uapi/linux/in.h, in6.h).
const (
	protoHopOpts  = 0
	protoICMP     = 1
	protoIGMP     = 2
	protoIPIP     = 4
	protoTCP      = 6
	protoUDP      = 17
	protoDCCP     = 33
	protoIPv6     = 41
	protoRouting  = 43
	protoFragment = 44
	protoGRE      = 47
	protoESP      = 50
	protoAH       = 51
	protoICMPv6   = 58
	protoNone     = 59
	protoDstOpts  = 60
	protoOSPF     = 89
	protoPIM      = 103
	protoVRRP     = 112
	protoSCTP     = 132
	protoUDPLite  = 136
)

// isIPv6Ext is include/linux/netfilter_ipv6.h:nf_ip6_ext_hdr.
func isIPv6Ext(h byte) bool {
	switch h {
	case protoHopOpts, protoRouting, protoFragment, protoESP, protoAH, protoNone, protoDstOpts:
		return true
	}
	return false
}

// ICMP types (include/uapi/linux/icmp.h, icmpv6.h).
const (
	icmpEchoReply      = 0
	icmpDestUnreach    = 3
	icmpSourceQuench   = 4
	icmpRedirect       = 5
	icmpEcho           = 8
	icmpTimeExceeded   = 11
	icmpParameterProb  = 12
	icmpTimestamp      = 13
	icmpTimestampReply = 14
	icmpAddress        = 17
	icmpAddressReply   = 18

	icmpFragNeeded = 4

	icmp6DestUnreach = 1
	icmp6PktTooBig   = 2
	icmp6TimeExceed  = 3
	icmp6ParamProb   = 4
	icmp6EchoRequest = 128
	icmp6EchoReply   = 129
)
