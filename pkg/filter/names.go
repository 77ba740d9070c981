package filter

// constants are the names that stand for a number anywhere in an expression
// (libpcap's scanner.l).
var constants = map[string]uint32{
	"icmptype": 0, "icmpcode": 1,
	"icmp-echoreply": 0, "icmp-unreach": 3, "icmp-sourcequench": 4, "icmp-redirect": 5,
	"icmp-echo": 8, "icmp-routeradvert": 9, "icmp-routersolicit": 10, "icmp-timxceed": 11,
	"icmp-paramprob": 12, "icmp-tstamp": 13, "icmp-tstampreply": 14, "icmp-ireq": 15,
	"icmp-ireqreply": 16, "icmp-maskreq": 17, "icmp-maskreply": 18,

	"icmp6type": 0, "icmp6code": 1,
	"icmp6-destinationunreach": 1, "icmp6-packettoobig": 2, "icmp6-timeexceeded": 3,
	"icmp6-parameterproblem": 4, "icmp6-echo": 128, "icmp6-echoreply": 129,
	"icmp6-multicastlistenerquery": 130, "icmp6-multicastlistenerreportv1": 131,
	"icmp6-multicastlistenerdone": 132, "icmp6-routersolicit": 133, "icmp6-routeradvert": 134,
	"icmp6-neighborsolicit": 135, "icmp6-neighboradvert": 136, "icmp6-redirect": 137,
	"icmp6-routerrenum": 138, "icmp6-nodeinformationquery": 139,
	"icmp6-nodeinformationresponse": 140, "icmp6-ineighbordiscoverysolicit": 141,
	"icmp6-ineighbordiscoveryadvert": 142, "icmp6-multicastlistenerreportv2": 143,
	"icmp6-homeagentdiscoveryrequest": 144, "icmp6-homeagentdiscoveryreply": 145,
	"icmp6-mobileprefixsolicit": 146, "icmp6-mobileprefixadvert": 147,
	"icmp6-certpathsolicit": 148, "icmp6-certpathadvert": 149,
	"icmp6-multicastrouteradvert": 151, "icmp6-multicastroutersolicit": 152,
	"icmp6-multicastrouterterm": 153,

	"tcpflags": 13, "tcp-fin": 0x01, "tcp-syn": 0x02, "tcp-rst": 0x04, "tcp-push": 0x08,
	"tcp-ack": 0x10, "tcp-urg": 0x20, "tcp-ece": 0x40, "tcp-cwr": 0x80,
}

// protocols are the protocol names of /etc/protocols in Debian 12 that a
// packet filter is asked about.
var protocols = map[string]uint8{
	"icmp": protoICMP, "igmp": protoIGMP, "ipencap": 4, "tcp": protoTCP, "udp": protoUDP,
	"dccp": 33, "ipv6": 41, "rsvp": 46, "gre": 47, "esp": protoESP, "ah": protoAH,
	"ipv6-icmp": protoICMPv6, "ospf": 89, "ipip": 94, "pim": protoPIM, "ipcomp": 108,
	"vrrp": protoVRRP, "l2tp": 115, "sctp": protoSCTP, "udplite": 136,
}

// etherTypes are the names that "ether proto" takes (libpcap's nametoaddr.c).
var etherTypes = map[string]uint16{
	"ip": etherIPv4, "ip6": etherIPv6, "arp": etherARP, "rarp": etherRARP,
}

// service is a well-known port and the protocols it is registered for.
type service struct {
	port   uint16
	protos []uint8
}

var (
	onTCP = []uint8{protoTCP}
	onUDP = []uint8{protoUDP}
	// onAny is what libpcap makes of a name that is registered for TCP and for UDP.
	onAny = []uint8{protoSCTP, protoTCP, protoUDP}
)

// services are the port names of /etc/services in Debian 12 that a packet
// filter is asked about.
var services = map[string]service{
	"echo": {7, onAny}, "discard": {9, onAny}, "daytime": {13, onAny}, "chargen": {19, onAny},
	"ftp-data": {20, onTCP}, "ftp": {21, onTCP}, "ssh": {22, onTCP}, "telnet": {23, onTCP},
	"smtp": {25, onTCP}, "mail": {25, onTCP}, "time": {37, onAny}, "whois": {43, onTCP},
	"tacacs": {49, onAny}, "domain": {53, onAny}, "bootps": {67, onUDP}, "bootpc": {68, onUDP},
	"tftp": {69, onUDP}, "http": {80, onTCP}, "www": {80, onTCP}, "kerberos": {88, onAny},
	"pop3": {110, onTCP}, "sunrpc": {111, onAny}, "auth": {113, onTCP}, "nntp": {119, onTCP},
	"ntp": {123, onUDP}, "netbios-ns": {137, onUDP}, "netbios-dgm": {138, onUDP},
	"netbios-ssn": {139, onTCP}, "imap2": {143, onTCP}, "imap": {143, onTCP},
	"snmp": {161, onAny}, "snmp-trap": {162, onAny}, "bgp": {179, onTCP}, "ldap": {389, onAny},
	"https": {443, onAny}, "microsoft-ds": {445, onTCP}, "submissions": {465, onTCP},
	"smtps": {465, onTCP}, "isakmp": {500, onUDP}, "rtsp": {554, onAny}, "ipp": {631, onTCP},
	"dhcpv6-client": {546, onUDP}, "dhcpv6-server": {547, onUDP}, "submission": {587, onTCP},
	"ldaps": {636, onAny}, "domain-s": {853, onAny}, "rsync": {873, onTCP}, "imaps": {993, onTCP},
	"pop3s": {995, onTCP}, "socks": {1080, onTCP}, "openvpn": {1194, onAny},
	"ms-sql-s": {1433, onTCP}, "radius": {1812, onAny}, "radius-acct": {1813, onAny},
	"nfs": {2049, onAny}, "mysql": {3306, onTCP}, "ms-wbt-server": {3389, onTCP},
	"ipsec-nat-t": {4500, onUDP}, "sip": {5060, onAny}, "sip-tls": {5061, onAny},
	"mdns": {5353, onUDP}, "postgresql": {5432, onTCP}, "x11": {6000, onTCP},
	"redis": {6379, onTCP}, "http-alt": {8080, onTCP},
}
