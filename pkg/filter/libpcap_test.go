package filter

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
)

// tcpdump returns the path of tcpdump, whose libpcap is the reference, and
// which reads port and protocol names from Debian's package netbase.
func tcpdump(t *testing.T) string {
	path, err := exec.LookPath("tcpdump")
	for _, names := range []string{"/etc/services", "/etc/protocols"} {
		if err == nil {
			_, err = os.Stat(names)
		}
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("comparing with libpcap needs tcpdump and netbase: %v", err)
		}
		t.Skipf("comparing with libpcap needs tcpdump and netbase: %v", err)
	}
	return path
}

// classic compiles an expression with libpcap.
func classic(t *testing.T, path, expr string, options ...string) (*bpf.VM, error) {
	t.Helper()
	args := append([]string{"-ddd", "-y", "EN10MB"}, options...)
	cmd := exec.Command(path, append(args, "--", expr)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if strings.Contains(stderr.String(), "expression rejects all packets") {
		// The optimizer has found that nothing can match, which tcpdump refuses.
		return bpf.NewVM([]bpf.Instruction{bpf.RetConstant{}})
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	var program []bpf.Instruction
	scanner := bufio.NewScanner(bytes.NewReader(out))
	scanner.Scan() // the number of instructions
	for scanner.Scan() {
		var v [4]uint64
		for i, f := range strings.Fields(scanner.Text()) {
			if v[i], err = strconv.ParseUint(f, 10, 32); err != nil {
				t.Fatalf("tcpdump -ddd %q printed %q", expr, scanner.Text())
			}
		}
		program = append(program, bpf.RawInstruction{Op: uint16(v[0]), Jt: uint8(v[1]), Jf: uint8(v[2]), K: uint32(v[3])}.Disassemble())
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatalf("tcpdump -ddd %q: %v", expr, err)
	}
	return vm, nil
}

func classicMatch(t *testing.T, vm *bpf.VM, packet []byte) bool {
	n, err := vm.Run(packet)
	if err != nil {
		t.Fatal(err)
	}
	return n > 0
}

// TestAgainstLibpcap compares verdicts for expressions × packets.
func TestAgainstLibpcap(t *testing.T) {
	path := tcpdump(t)
	r := rand.New(rand.NewPCG(1, 2))
	packets := handMade()
	whole := len(packets)
	packets = append(packets, truncated()...)
	for range 1000 {
		packets = append(packets, generate(r))
	}
	tuples := make([]Tuple, len(packets))
	for i, p := range packets {
		tuples[i] = ParsePacket(p)
	}

	exprs := append([]string(nil), accepted...)
	for len(exprs) < len(accepted)+700 {
		if e := randomExpr(r, new(bool), 3); tryParse(e) {
			exprs = append(exprs, e)
		}
	}

	var compared, unsettled, matched int
	for _, expr := range exprs {
		e, err := Parse(expr)
		if err != nil {
			t.Errorf("Parse(%q): %v", expr, err)
			continue
		}
		optimized, err := classic(t, path, expr)
		if err != nil {
			t.Errorf("%q is accepted, but not by tcpdump: %v", expr, err)
			continue
		}
		plain, err := classic(t, path, expr, "-O")
		if err != nil {
			t.Errorf("tcpdump -O %q: %v", expr, err)
			continue
		}
		insns := e.Instructions()
		for i, p := range packets {
			want := classicMatch(t, optimized, p)
			if want != classicMatch(t, plain, p) {
				// libpcap does not agree with itself: its optimizer has
				// dropped a load behind the end of a truncated packet.
				unsettled++
				if i < whole {
					t.Errorf("%q: libpcap's optimizer changes the verdict for the whole packet %x", expr, p)
				}
				continue
			}
			got, err := run(insns, &tuples[i])
			if err != nil {
				t.Fatalf("%q: %v\n%v", expr, err, insns)
			}
			if (got == 1) != want {
				t.Errorf("%q: got %d, libpcap says %v for packet %d: %x\n%+v\n%v", expr, got, want, i, p, tuples[i], insns)
				break
			}
			compared++
			matched += int(got)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d expressions × %d packets: %d verdicts agree, %d of them a match; %d unsettled",
		len(exprs), len(packets), compared, matched, unsettled)
	if unsettled*100 > compared {
		t.Errorf("%d verdicts out of %d were not compared", unsettled, compared)
	}
}

// TestStringAgainstLibpcap checks that libpcap reads String as it reads the
// original.
func TestStringAgainstLibpcap(t *testing.T) {
	path := tcpdump(t)
	packets := handMade()
	for _, expr := range accepted {
		e, err := Parse(expr)
		if err != nil {
			t.Errorf("Parse(%q): %v", expr, err)
			continue
		}
		original, err := classic(t, path, expr)
		if err != nil {
			t.Errorf("tcpdump %q: %v", expr, err)
			continue
		}
		printed, err := classic(t, path, e.String())
		if err != nil {
			t.Errorf("%q prints as %q, which tcpdump refuses: %v", expr, e.String(), err)
			continue
		}
		for _, p := range packets {
			if classicMatch(t, original, p) != classicMatch(t, printed, p) {
				t.Errorf("%q prints as %q, which libpcap takes for something else (packet %x)", expr, e.String(), p)
				break
			}
		}
	}
}

// TestNamesAgainstLibpcap compares the tables with the system's.
func TestNamesAgainstLibpcap(t *testing.T) {
	path := tcpdump(t)
	var exprs []string
	for name := range services {
		exprs = append(exprs, "port "+name)
	}
	for name := range protocols {
		exprs = append(exprs, `proto \`+name)
	}
	for name := range etherTypes {
		exprs = append(exprs, `ether proto \`+name)
	}
	for name, n := range constants {
		exprs = append(exprs, fmt.Sprintf("len == %s + %d", name, n))
	}
	for _, expr := range exprs {
		e, err := Parse(expr)
		if err != nil {
			t.Errorf("Parse(%q): %v", expr, err)
			continue
		}
		args := func(expr string) []string { return []string{"-d", "-y", "EN10MB", "--", expr} }
		want, err := exec.Command(path, args(expr)...).CombinedOutput()
		if err != nil {
			t.Errorf("tcpdump %q: %s", expr, want)
			continue
		}
		got, err := exec.Command(path, args(e.String())...).CombinedOutput()
		if err != nil || !bytes.Equal(want, got) {
			t.Errorf("%q is %q here, but not for tcpdump", expr, e)
		}
	}
}

func tryParse(expr string) bool {
	_, err := Parse(expr)
	return err == nil
}

// randomExpr makes an expression of at most that depth. vlan is used once.
func randomExpr(r *rand.Rand, vlan *bool, depth int) string {
	if depth > 0 && r.IntN(3) > 0 {
		left := randomExpr(r, vlan, depth-1)
		op := pick(r, []string{" and ", " or ", " && ", " || "})
		switch r.IntN(8) {
		case 0:
			return "not " + randomExpr(r, vlan, depth-1)
		case 1:
			return "!(" + left + ")"
		case 2:
			return "(" + left + ")" + op + "(" + randomExpr(r, vlan, depth-1) + ")"
		}
		return left + op + randomExpr(r, vlan, depth-1)
	}
	if !*vlan && r.IntN(12) == 0 {
		*vlan = true
		return pick(r, []string{"vlan", "vlan 5", "vlan 100"}) + pick(r, []string{" and ", " and not ", ""}) +
			pick(r, []string{"tcp", "port 80", "len > 60", "host 10.0.0.1", "ip6"})
	}
	return randomPrimitive(r)
}

func randomPrimitive(r *rand.Rand) string {
	d := pick(r, []string{"", "", "src ", "dst ", "src or dst ", "src and dst ", "dst or src "})
	v4 := pick(r, someIPv4)
	values := func(v func() string) string {
		switch r.IntN(6) {
		case 0:
			return v() + " or " + v()
		case 1:
			return "(" + v() + " or not " + v() + ")"
		case 2:
			return "not " + v()
		}
		return v()
	}
	port := func() string { return strconv.Itoa(int(pick(r, somePorts))) }
	host := func() string {
		a := pick(r, someIPv4)
		return fmt.Sprintf("%d.%d.%d.%d", a[0], a[1], a[2], a[3])
	}
	ip6 := func() string {
		return pick(r, []string{"::1", "2001:db8::1", "2001:db8:1::ff", "fe80::200:0:0:1", "ff02::1"})
	}
	mac := func() string {
		m := pick(r, someMACs)
		return fmt.Sprintf("%x:%x:%x:%x:%x:%x", m[0], m[1], m[2], m[3], m[4], m[5])
	}
	proto := func() string { return strconv.Itoa(int(pick(r, someProto))) }
	number := func() string { return strconv.Itoa(r.IntN(300)) }
	compare := func() string { return pick(r, []string{" = ", " == ", " != ", " < ", " <= ", " > ", " >= "}) }
	l4 := pick(r, []string{"", "tcp ", "udp ", "sctp "})
	switch r.IntN(15) {
	case 0, 1:
		return l4 + d + "port " + values(port)
	case 2:
		return l4 + d + "portrange " + values(func() string { return port() + "-" + port() })
	case 3, 4:
		return pick(r, []string{"", "ip ", "arp ", "rarp "}) + d + "host " + values(host)
	case 5:
		return pick(r, []string{"", "ip6 "}) + d + "host " + values(ip6)
	case 6:
		bits := 8 * (1 + r.IntN(3))
		return fmt.Sprintf("%snet %s/%d", d, ipv4String(binaryIPv4(v4)&leading(bits)), bits)
	case 7:
		return d + "net " + pick(r, []string{"10", "10.1", "192.168.1", "192.0.2.0 mask 255.255.255.0",
			"10.0.0.0 mask 255.0.0.255", "2001:db8::/32", "fe80::/10", "2001:db8::/47", "::/0", "0.0.0.0/0"})
	case 8:
		return "ether " + pick(r, []string{"host ", "src ", "dst ", "src and dst "}) + values(mac)
	case 9:
		return pick(r, []string{"ip", "ip6", "arp", "rarp", "tcp", "udp", "sctp", "icmp", "icmp6", "igmp", "pim", "vrrp", "carp", "ah", "esp"})
	case 10:
		return pick(r, []string{"", "ip ", "ip6 "}) + "proto " + values(proto)
	case 11:
		return pick(r, []string{"less ", "greater "}) + number()
	case 12:
		return "len" + pick(r, []string{"", " - 14", " & 0xff", " / 2", " * 3"}) + compare() + number()
	case 13:
		return pick(r, []string{"tcp[tcpflags]", "tcp[13]", "(tcp[13] & tcp-syn)", "tcp[13] & (tcp-ack|tcp-syn)", "tcp[13] >> 3 & 3"}) + compare() +
			pick(r, []string{"0", "2", "tcp-syn", "0x12", "tcp-syn|tcp-ack"})
	default:
		return pick(r, []string{"icmp[icmptype]", "icmp[icmpcode]", "icmp6[icmp6type]", "icmp6[1]"}) + compare() +
			pick(r, []string{"0", "icmp-echo", "icmp6-echo", "1", "135"})
	}
}

func binaryIPv4(a [4]byte) uint32 {
	return uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])
}

// accepted are expressions that must be accepted and mean what libpcap makes of them.
var accepted = strings.Split(strings.TrimSpace(`
ip
ip6
arp
rarp
tcp
udp
sctp
icmp
icmp6
igmp
pim
vrrp
carp
ah
esp
not ip
! tcp
not not tcp
host 10.0.0.1
src host 10.0.0.1
dst host 10.0.0.1
src 10.0.0.1
dst 10.1.2.3
src or dst 10.0.0.1
src or dst host 10.0.0.1
dst or src host 10.0.0.1
src and dst host 0.0.0.0
dst and src host 255.255.255.255
ip host 10.0.0.1
ip src 10.0.0.1
arp host 10.0.0.1
arp src host 10.0.0.1
arp dst 10.1.2.3
rarp host 0.0.0.0
host 10.1
host 10
host 255.255.255.255
host ::1
host 2001:db8::1
src host 2001:db8::1
ip6 host 2001:db8::1
ip6 src 2001:db8::1
ip6 dst host ff02::1
host ::ffff:1.2.3.4
host 10.0.0.1 or 10.1.2.3
src host 10.0.0.1 or 10.1.2.3
host 10.0.0.1 and 10.1.2.3
host (10.0.0.1 or 192.0.2.7)
host (10.0.0.1 or not 10.1.2.3)
host 10.0.0.1 or 2001:db8::1
host 10.0.0.1 and not 10.1.2.3
not host 10.0.0.1
not host 10.0.0.1 and not 10.1.2.3
net 10
net 0
net 10.1
net 192.168.1
net 10.0.0.0/8
net 10.1/16
net 10.0.0.0/31
net 0.0.0.0/0
net 192.0.2.0 mask 255.255.255.0
net 10.0.0.1 mask 255.0.0.255
src net 10
ip net 192.168.1.0/24
arp net 10.0.0.0/8
net 256
net 2001:db8::/32
net 2001:db8::/47
net 2001:db8:1::/48
net ::/0
net ff00::/8
net 2001:db8::1/128
net 2001:db8::1
net 10.1.2.3
src and dst net 2001:db8::/32
ip6 net fe80::/10
ip6 src net 2001:db8::/33
port 80
port 0
port 65535
src port 1024
dst port 80
src or dst port 53
src and dst port 53
dst and src port 53
tcp port 80
udp port 53
sctp port 80
tcp src port 1024
udp dst port 53
tcp src or dst port 443
port 80 or 443
tcp port 80 or 443
tcp port (80 or 443)
tcp port 80 or udp port 53
port (80)
port 80 or (443)
port 80 or (443 or not 22)
port not 80
port 80 and not 443
not port 80
not tcp port 80
not (port 80 or port 443)
port 0x50
port 0120
port http
port domain
port ssh or http or https
tcp port http
tcp port domain
udp port domain
udp port ntp
sctp port domain
portrange 1-1023
portrange 1023-1
portrange 0-65535
portrange 80
portrange 80-80
tcp portrange 1-1023
tcp src portrange 1-5
udp dst portrange 50-60
src and dst portrange 1-100
portrange 1-22 or 443-8080
not portrange 1-1023
proto 6
proto 255
ip proto 6
ip6 proto 6
ip proto 0
ip6 proto 0
ip6 proto 44
ip6 proto 58
proto 58
ip proto (6 or 17)
ip proto (\tcp or \udp)
ip proto 6 or 17
ip proto not 6
ip proto \tcp
ip6 proto \udp
proto \sctp
ip proto gre
proto ospf
ip6 proto ipv6-icmp
proto \icmp
ether proto 0x800
ether proto 0x86dd
ether proto \ip
ether proto \ip6
ether proto \arp
ether proto \rarp or \arp
ether proto 0x88cc
not ether proto 0x800
ether proto 0x8847
tcp[tcpflags] & (tcp-syn|tcp-ack) != 0
tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn
tcp[tcpflags] == tcp-syn
tcp[tcpflags]&tcp-syn!=0
tcp[tcpflags] & tcp-syn != 0 and not tcp[tcpflags] & tcp-ack != 0
tcp[13] & 2 = 2
tcp[13] = 18
tcp[13:1] = 2
tcp[12+1] = 2
tcp[(13)] = (2)
(tcp[13] & 2) != 0
((tcp[13] & 2)) = (2)
((tcp[13] & 2) != 0)
tcp[13] > 0x10
tcp[13] >= 16
tcp[13] < 3
tcp[13] <= 3
tcp[13] != 0
not tcp[13] = 0
not tcp[13] != 0
tcp[13] >> 1 & 1 = 1
tcp[13] << 24 > 0x80000000
tcp[13] + 1 * 2 = 4
tcp[13] - 3 > 5
tcp[13] - 1 - 1 = 0
tcp[13] | 1 = 3
tcp[13] & 3 | 4 = 7
tcp[13] & 1 + 1 = 2
tcp[13] / 2 / 2 = 4
tcp[13] * 2 * 3 = 12
tcp[13] = 300
tcp[tcpflags] & (tcp-fin|tcp-rst|tcp-push|tcp-urg|tcp-ece|tcp-cwr) = 0
icmp[icmptype] == icmp-echo
icmp[icmptype] = icmp-echoreply or icmp[icmptype] = icmp-echo
icmp[icmptype] != icmp-echo and icmp[icmptype] != icmp-echoreply
icmp[0] == 8
icmp[1] = 0
icmp[icmpcode] != 0
icmp[icmptype] = icmp-unreach and icmp[icmpcode] = 1
icmp6[icmp6type] == icmp6-echo
icmp6[icmp6type] = icmp6-neighborsolicit
icmp6[0] >= 133
icmp6[icmp6code] = 0
icmp6[1] != 0
icmp6[0:1] - 128 < 2
not icmp6[0] = 128
less 60
greater 60
less 14
greater 0
len > 60
len >= 60
len = 54
length != 54
len - 14 > 40
len & 1 = 0
len < 0x80000000
len <= 4294967295
len * 100000000 > 4000000000
(len) > 60
(len > 60)
not less 60
ether host 02:00:00:00:00:01
ether src 2:0:0:0:0:1
ether dst ff:ff:ff:ff:ff:ff
ether src host 02:00:00:00:00:01
ether src or dst de:ad:be:ef:00:01
ether src and dst 2:0:0:0:0:1
ether host de-ad-be-ef-0-1
ether host dead.beef.0001
ether host deadbeef0001
ether host de.ad.be.ef.00.01
link host 2:0:0:0:0:1
ether host 2:0:0:0:0:1 or 2:0:0:0:0:2
not ether host 2:0:0:0:0:1
vlan
vlan 5
vlan 0
vlan (5)
vlan 4095
not vlan
not vlan 5
vlan and ip
vlan 5 and ip
vlan and tcp port 80
vlan 5 and port 80
vlan and not ip
vlan and not tcp
vlan 5 and host 10.0.0.1
vlan 5 and host 2001:db8::1
vlan and arp
vlan and (arp or tcp port 80)
vlan and (host 10.0.0.1 or 2001:db8::1) and not port 22
vlan and ip6 and udp port 53
vlan and tcp[tcpflags] & tcp-syn != 0
vlan and ether proto 0x800
vlan and not (tcp or udp)
vlan or len > 60
vlan 5 or less 60
vlan or ether host 2:0:0:0:0:1
ip or vlan
ip and vlan
arp or (vlan and arp)
not vlan 5 or tcp
not (vlan and ip)
not (not vlan or ip)
tcp or (vlan 5 and tcp)
tcp port 80 or (vlan and tcp port 80)
(vlan 5) and (tcp)
not ip and vlan
tcp and host 10.0.0.1
tcp and host 10.0.0.1 and port 80
tcp or udp and port 53
tcp and udp or icmp
udp or tcp and host 10.0.0.1
icmp and host 10.0.0.1
icmp or icmp6
tcp && udp || icmp
tcp||udp
(tcp)
((tcp))
port ((80) or 81)
port (80 or ((81)))
port not ((80))
ip proto ((1))
host (10.0.0.1 or (10.0.0.2 or 10.0.0.3))
(tcp or udp) and port 80
(tcp) or (udp)
not (tcp or udp)
not tcp or udp
!(tcp)
!tcp&&!udp
host 10.0.0.1 and port 80 or 443
host 10.0.0.1 and port 80 or 443 or (host 192.0.2.7) or 22
tcp port 80 and (udp port 53) or 443
tcp port 80 or (host 10.0.0.1 and (udp port 53) or 10.1.2.3) or 22
port 80 or port 443 and host 10.0.0.1
host 10.0.0.1 and (port 80 or 443)
src host 10.0.0.1 and dst port 80
src host 10.0.0.1 and not dst port 80
tcp and not port 22
ip and not tcp and not udp
ip6 and not icmp6
ip or ip6
not ip and not ip6
not arp
tcp port 22 and not host 10.0.0.1
icmp and not icmp[icmptype] = icmp-echo
greater 100 and less 1000
`), "\n")
