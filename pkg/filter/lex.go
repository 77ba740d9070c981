package filter

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// kind is what libpcap's scanner.l makes of a token.
type kind int

const (
	kindEnd    kind = iota
	kindSymbol      // an operator or a keyword, by its canonical text
	kindNumber      // a number or a named constant
	kindIPv4        // two to four numbers with dots between
	kindIPv6
	kindMAC
	kindName    // anything else that begins with a letter or digit
	kindInvalid // nothing that the language knows
)

type token struct {
	kind kind
	text string // as written; a symbol's canonical text
	num  uint32 // of kindNumber
	pos  int    // byte offset
}

// symbols maps the keywords that are supported, and the spellings of operators,
// to their canonical text.
var symbols = map[string]string{
	"src": "src", "dst": "dst", "host": "host", "net": "net", "mask": "mask",
	"port": "port", "portrange": "portrange", "proto": "proto",
	"ether": "ether", "link": "ether",
	"ip": "ip", "ip6": "ip6", "arp": "arp", "rarp": "rarp",
	"tcp": "tcp", "udp": "udp", "sctp": "sctp", "icmp": "icmp", "icmp6": "icmp6",
	"igmp": "igmp", "pim": "pim", "vrrp": "vrrp", "carp": "carp", "ah": "ah", "esp": "esp",
	"vlan": "vlan", "less": "less", "greater": "greater", "len": "len", "length": "len",
	"and": "and", "&&": "and", "or": "or", "||": "or", "not": "not", "!": "not",
	"=": "==", "==": "==", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">=",
	"<<": "<<", ">>": ">>", "+": "+", "-": "-", "*": "*", "/": "/", "&": "&", "|": "|",
	"(": "(", ")": ")", "[": "[", "]": "]", ":": ":",
}

// unsupported are the words that libpcap knows and this package does not. They
// are no names: libpcap would not take them for one.
var unsupported = words(`ppp slip fddi tr wlan igrp radio atalk aarp decnet lat sca moprc mopdl
	iso esis es-is isis is-is l1 l2 iih lsp snp csnp psnp clnp stp ipx netbeui
	protochain gateway type subtype direction dir
	address1 addr1 address2 addr2 address3 addr3 address4 addr4 ra ta
	byte broadcast multicast inbound outbound ifindex mpls pppoed pppoes geneve vxlan
	lane llc metac bcc oam oamf4 oamf4ec oamf4sc sc ilmic vpi vci connectmsg metaconnect
	on ifname rset ruleset rnr rulenum srnr subrulenum reason action
	fisu lssu lsu msu hfisu hlssu hmsu sio opc dpc sls hsio hopc hdpc hsls`)

func words(s string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(s) {
		m[w] = true
	}
	return m
}

var (
	wordRE     = regexp.MustCompile(`^[A-Za-z0-9]([-_.A-Za-z0-9]*[.A-Za-z0-9])?`)
	colonsRE   = regexp.MustCompile(`^[0-9A-Fa-f:.]*`)
	escapedRE  = regexp.MustCompile(`^\\[^ !()\n\t]+`)
	operatorRE = regexp.MustCompile(`^(&&|\|\||==|!=|<=|>=|<<|>>|[-+*/:\[\]!<>()&|=])`)
	numberRE   = regexp.MustCompile(`^([0-9]+|0[xX][0-9A-Fa-f]+)$`)
	ipv4RE     = regexp.MustCompile(`^[0-9]+(\.[0-9]+){1,3}$`)
	macRE      = regexp.MustCompile(`^([0-9A-Fa-f]{1,2}(:[0-9A-Fa-f]{1,2}){5}|` +
		`[0-9A-Fa-f]{1,2}(-[0-9A-Fa-f]{1,2}){5}|[0-9A-Fa-f]{1,2}(\.[0-9A-Fa-f]{1,2}){5}|` +
		`[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}|[0-9A-Fa-f]{12})$`)
)

// scan splits an expression into tokens; the last one is kindEnd. Like the
// scanner of libpcap it takes the longest match.
func scan(expr string) ([]token, error) {
	var tokens []token
	for pos := 0; pos < len(expr); {
		rest := expr[pos:]
		if strings.IndexByte(" \t\r\n", rest[0]) >= 0 {
			pos++
			continue
		}
		t, n, err := scanOne(rest)
		if err != nil {
			return nil, fmt.Errorf("%w at position %d", err, pos+1)
		}
		t.pos = pos
		tokens = append(tokens, t)
		pos += n
	}
	return append(tokens, token{kind: kindEnd, text: "end of expression", pos: len(expr)}), nil
}

// scanOne returns the token that s begins with and its length in bytes.
func scanOne(s string) (token, int, error) {
	if addr := colonsRE.FindString(s); strings.Count(addr, ":") >= 2 {
		t := token{kind: kindInvalid, text: addr}
		if macRE.MatchString(addr) {
			t.kind = kindMAC
		} else if a, err := netip.ParseAddr(addr); err == nil && a.Is6() {
			t.kind = kindIPv6
		}
		if t.kind == kindInvalid || wordRE.MatchString(s[len(addr):]) {
			return token{}, 0, fmt.Errorf("malformed address %q", addr)
		}
		return t, len(addr), nil
	}
	if name := escapedRE.FindString(s); name != "" {
		return token{kind: kindName, text: name[1:]}, len(name), nil
	}
	if op := operatorRE.FindString(s); op != "" {
		return token{kind: kindSymbol, text: symbols[op]}, len(op), nil
	}
	word := wordRE.FindString(s)
	if word == "" {
		for _, r := range s {
			return token{}, 0, fmt.Errorf("unsupported character %q", r)
		}
	}
	t, err := scanWord(word)
	return t, len(word), err
}

func scanWord(word string) (token, error) {
	t := token{text: word}
	switch {
	case symbols[word] != "":
		t.kind, t.text = kindSymbol, symbols[word]
	case unsupported[word]:
		return t, fmt.Errorf("unsupported word %q (supported are %s)", word, supported)
	case macRE.MatchString(word):
		t.kind = kindMAC
	case numberRE.MatchString(word):
		t.kind = kindNumber
		// Base 0 reads a leading 0 as octal and 0x as hexadecimal, as libpcap does.
		n, err := strconv.ParseUint(word, 0, 32)
		if err != nil {
			return t, fmt.Errorf("number %q is not valid or does not fit into 32 bits", word)
		}
		t.num = uint32(n)
	case ipv4RE.MatchString(word):
		t.kind = kindIPv4
	default:
		t.kind = kindName
		if n, ok := constants[word]; ok {
			t.kind, t.num = kindNumber, n
		}
	}
	return t, nil
}

// supported says in one line what the language has.
const supported = "host, net, port, portrange, proto with src, dst; " +
	"ip, ip6, arp, rarp, tcp, udp, sctp, icmp, icmp6, igmp, pim, vrrp, carp, ah, esp; " +
	"ether host, ether proto, vlan, less, greater, len, tcp[tcpflags], icmp[icmptype], icmp[icmpcode], " +
	"icmp6[icmp6type], icmp6[icmp6code]; and, or, not, parentheses"
