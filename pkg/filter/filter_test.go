package filter

import (
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/asm"
)

// TestTupleLayout guards the alignment that the verifier wants of loads from
// the stack, and that the compiler relies on.
func TestTupleLayout(t *testing.T) {
	if size := unsafe.Sizeof(Tuple{}); size != 68 {
		t.Errorf("Tuple has %d bytes, want 68", size)
	}
	var end uintptr
	for f := range reflect.TypeFor[Tuple]().Fields() {
		if f.Offset != end {
			t.Errorf("there is a hole before %s: name it", f.Name)
		}
		end = f.Offset + f.Type.Size()
	}
	for name, off := range map[string]uintptr{
		"SMAC": unsafe.Offsetof(Tuple{}.SMAC), "DMAC": unsafe.Offsetof(Tuple{}.DMAC),
	} {
		if off%2 != 0 {
			t.Errorf("%s is at the odd offset %d", name, off)
		}
	}
}

func TestBlankMatchesAll(t *testing.T) {
	for _, expr := range []string{"", " ", "\t\r\n"} {
		e, err := Parse(expr)
		if err != nil {
			t.Fatalf("Parse(%q): %v", expr, err)
		}
		if got, err := run(e.Instructions(), &Tuple{}); got != 1 || err != nil {
			t.Errorf("Parse(%q) gives %d, %v, want 1", expr, got, err)
		}
		if e.String() != "" {
			t.Errorf("Parse(%q) prints as %q", expr, e)
		}
	}
}

// TestWithoutMAC: what has no link header has no MAC, and is not cut off either.
func TestWithoutMAC(t *testing.T) {
	tuple := Tuple{EtherType: etherIPv4, L3Avail: 20}
	for expr, want := range map[string]uint64{
		"ether host 0:0:0:0:0:0":               0,
		"ether src and dst 0:0:0:0:0:0":        0,
		"not ether host 0:0:0:0:0:0":           1,
		"ip and not ether src 2:0:0:0:0:1":     1,
		"ip or ether src 0:0:0:0:0:0":          1,
		"vlan or ether host 0:0:0:0:0:0":       0,
		"not (vlan or ether host 0:0:0:0:0:0)": 1,
	} {
		e, err := Parse(expr)
		if err != nil {
			t.Fatalf("Parse(%q): %v", expr, err)
		}
		if got, err := run(e.Instructions(), &tuple); got != want || err != nil {
			t.Errorf("%q: %d, %v, want %d", expr, got, err, want)
		}
	}
}

func TestString(t *testing.T) {
	for expr, want := range map[string]string{
		"tcp  port 80 or 443":                  "tcp port 80 or tcp port 443",
		"port http":                            "tcp port 80",
		"host 10.1":                            "net 10.1.0.0/16",
		"net 10":                               "net 10.0.0.0/8",
		"net 10.0.0.1 mask 255.0.0.255":        "net 10.0.0.1 mask 255.0.0.255",
		"dst or src 10.0.0.1":                  "src or dst host 10.0.0.1",
		"ether src de-ad-be-ef-0-1":            "ether src host de:ad:be:ef:00:01",
		"tcp or udp and icmp":                  "(tcp or udp) and icmp",
		"tcp and (udp or icmp)":                "tcp and (udp or icmp)",
		"!(tcp||udp)":                          "not (tcp or udp)",
		"tcp[tcpflags] & (tcp-syn|tcp-ack)!=0": "(tcp[13] & 18) != 0",
		"vlan (5) && ip6 host 2001:DB8:0::1":   "vlan 5 and ip6 host 2001:db8::1",
		"portrange 9-1":                        "portrange 1-9",
		`ip proto (\tcp or 17)`:                "ip proto 6 or ip proto 17",
		"length<60":                            "len < 60",
	} {
		e, err := Parse(expr)
		if err != nil {
			t.Errorf("Parse(%q): %v", expr, err)
			continue
		}
		if e.String() != want {
			t.Errorf("%q prints as %q, want %q", expr, e, want)
		}
		checkReparse(t, e)
	}
}

// checkReparse checks that what an expression prints compiles to the same code.
func checkReparse(t *testing.T, e *Expr) {
	t.Helper()
	again, err := Parse(e.String())
	if err != nil {
		t.Fatalf("what %q prints is refused: %v", e, err)
	}
	if !reflect.DeepEqual(e.Instructions(), again.Instructions()) {
		t.Fatalf("%q compiles to other code the second time:\n%v\n%v", e, e.Instructions(), again.Instructions())
	}
}

// checkJumps checks that every jump goes forward and stays inside.
func checkJumps(t *testing.T, insns asm.Instructions) {
	t.Helper()
	reached := map[int]bool{0: true}
	for i, ins := range insns {
		if !reached[i] {
			t.Fatalf("instruction %d is unreachable, which the verifier refuses:\n%v", i, insns)
		}
		if ins.OpCode.Class() != asm.JumpClass {
			reached[i+1] = true
			continue
		}
		op := ins.OpCode.JumpOp()
		if op == asm.Exit {
			continue
		}
		to := i + 1 + int(ins.Offset)
		if ins.Offset < 0 || to >= len(insns) {
			t.Fatalf("instruction %d jumps to %d of %d:\n%v", i, to, len(insns), insns)
		}
		reached[to] = true
		if op != asm.Ja {
			reached[i+1] = true
		}
	}
	if reached[len(insns)] {
		t.Fatalf("the code runs off its end:\n%v", insns)
	}
}

func TestAcceptedInvariants(t *testing.T) {
	for _, expr := range accepted {
		e, err := Parse(expr)
		if err != nil {
			t.Errorf("Parse(%q): %v", expr, err)
			continue
		}
		checkJumps(t, e.Instructions())
		checkReparse(t, e)
	}
}

func TestErrors(t *testing.T) {
	for _, test := range []struct{ expr, want string }{
		{"foo", `unknown word "foo" (supported are`},
		{"tcp and foo", `unknown word "foo" (supported are`},
		{"wlan", `unsupported word "wlan" (supported are`},
		{"ip broadcast", `unsupported word "broadcast"`},
		{"ip multicast", `unsupported word "multicast"`},
		{"ip6 protochain 6", `unsupported word "protochain"`},
		{"gateway 10.0.0.1", `unsupported word "gateway"`},
		{"mpls 5", `unsupported word "mpls"`},
		{"tcp@", `unsupported character '@' at position 4`},
		{"tcp[13] % 2 = 0", `unsupported character '%' at position 9`},
		{"tcp\x00", `unsupported character '\x00' at position 4`},
		{"\xff", `unsupported character`},
		{"host example.org", `"example.org" is not an address, and names are not resolved: give an address at position 6`},
		{"net loopback", `names are not resolved: give a network such as 10.0.0.0/8`},
		{"host", `the expression ends where an address is missing at position 5`},
		{"host tcp", `unexpected "tcp" where an address is expected at position 6`},
		{"tcp host 10.0.0.1", `tcp cannot have the IPv4 address "10.0.0.1" at position 10`},
		{"ip6 host 10.0.0.1", `ip6 cannot have the IPv4 address`},
		{"ip host ::1", `ip cannot have the IPv6 address`},
		{"ether host 10.0.0.1", `ether cannot have the IPv4 address`},
		{"host 1:2:3:4:5:6", `needs ether host, ether src or ether dst`},
		{"ether net 1:2:3:4:5:6", `needs ether host`},
		{"host 1:2:3", `malformed address "1:2:3" at position 6`},
		{"host ::1::", `malformed address "::1::"`},
		{"host ::1xyz", `malformed address "::1"`},
		{"host 256.1.1.1", `malformed IPv4 address "256.1.1.1"`},
		{"host 010.0.0.1", `without leading zeros`},
		{"host 1.2.3.4.5", `is not an address`},
		{"host 10.0.0.1/32", `needs net, not host`},
		{"src 10.0.0.0/8", `needs net, not host`},
		{"host 2001:db8::/32", `needs net, not host`},
		{"net 10/8", `needs a network with a dot, such as 10.0, not "10", at position 5`},
		{"net 10.0.0.0/33", `a prefix length from 0 to 32 is expected, not "33", at position 14`},
		{"net 10.0.0.0/", `a prefix length from 0 to 32`},
		{"net 10.0.0.1/8", `has bits set outside of its mask, the network is 10.0.0.0`},
		{"net 10.0.0.1 mask 255.0.0.0", `has bits set outside of its mask`},
		{"net 10.0.0.1 mask 255", `a mask such as 255.255.0.0 is expected`},
		{"net 2001:db8::1/32", `the network is 2001:db8::/32`},
		{"net ::/129", `a prefix length from 0 to 128`},
		{"port 65536", `a port number or name up to 65535 is expected, not "65536",`},
		{"port", `the expression ends where a port number or name is missing`},
		{"port nosuch", `unknown port name "nosuch", give its number at position 6`},
		{"port 1-5", `unknown port name "1-5"`},
		{"udp port http", `port "http" is not one of udp, give its number`},
		{"ip port 80", `ip has no ports, use tcp, udp or sctp`},
		{"port 10.0.0.1", `a port number or name up to 65535 is expected`},
		{"host ((10.0.0.1))", `unexpected "(" where an address is expected at position 7`},
		{"host 10.0.0.1 or ((10.0.0.2) or 10.0.0.3)", `unexpected "(" where an address is expected at position 19`},
		{"port ((80 or 81))", `unexpected "(" where a port number or name is expected at position 7`},
		{"port not (((80) or 81) or 82)", `unexpected "(" where a port number or name is expected at position 11`},
		{"port ((http))", `unexpected "("`},
		{"port ((80", `unexpected "("`},
		{"portrange http-https", `malformed port range "http-https"`},
		{"portrange 1-65536", `malformed port range`},
		{"portrange 0x1-5", `malformed port range`},
		{"portrange 01-5", `malformed port range`},
		{"portrange 1 - 5", `unexpected "-" where and, or or the end is expected`},
		{"port 08", `number "08" is not valid`},
		{"less 4294967296", `does not fit into 32 bits`},
		{"ip proto tcp", `"tcp" is a keyword, write \tcp after proto, at position 10`},
		{"ip proto 256", `unknown protocol "256", give its number (up to 255)`},
		{"proto nosuch", `unknown protocol "nosuch"`},
		{"tcp proto 6", `proto cannot follow tcp, only ip, ip6 and ether`},
		{"src proto 6", `unexpected "proto"`},
		{"ether proto 0x8100", `use vlan`},
		{"ether proto 5", `unsupported Ethernet type "5"`},
		{"ether proto 0x809b", `unsupported Ethernet type "0x809b"`},
		{"ether", `the expression ends where host, src, dst or proto after ether is missing`},
		{"80", `"80" needs a qualifier before it, such as host, net, port or proto, at position 1`},
		{"tcp or 80", `"80" needs a qualifier before it`},
		{"udp 80", `unexpected "80" where and, or or the end is expected at position 5`},
		{"(host 10.0.0.1) or 10.0.0.2", `"10.0.0.2" needs a qualifier before it`},
		{"icmp[icmptype] = icmp-echo or icmp-unreach", `"icmp-unreach" needs a qualifier`},
		{"src or host 10.0.0.1", `unexpected "host" where "dst" is expected`},
		{"tcp and", `the expression ends where a primitive such as host, net, port, tcp is missing`},
		{"and tcp", `unexpected "and" where a primitive`},
		{"(tcp", `the expression ends where ")" is missing at position 5`},
		{"tcp)", `unexpected ")"`},
		{"()", `unexpected ")"`},
		{"not", `the expression ends where`},
		{"tcp[12] = 0", `unsupported tcp[12] (supported are tcp[tcpflags], icmp[icmptype]`},
		{"tcp[0:2] = 80", `only single bytes can be read`},
		{"ip[9] = 6", `unsupported ip[9]`},
		{"udp[4:2] > 5", `only single bytes can be read`},
		{"ether[0] & 1 = 1", `unsupported ether[0]`},
		{"tcp[len] = 1", `the index of tcp[…] must be a constant`},
		{"tcp[13", `the expression ends where "]" is missing`},
		{"tcp[13]", `the expression ends where a comparison (== != < <= > >=) is missing`},
		{"tcp[13] & 2", `a comparison (== != < <= > >=) is missing`},
		{"tcp[13] = icmp[0]", `only a constant can stand behind the comparison, not "icmp",`},
		{"tcp[13] & tcp[13] = 2", `only a constant can stand on the right of "&"`},
		{"tcp[13] / 0 = 1", `division by zero at position 9`},
		{"tcp[13] << 32 = 1", `shift by more than 31 bits at position 9`},
		{"len = -1", `unexpected "-"`},
		{"less", `a number of bytes is expected after less`},
		{"vlan 4096", `VLAN id "4096" is above 4095`},
		{"vlan 5 or vlan 6", `a second vlan would look for a tag behind the first one`},
		{"vlan and vlan", `a second vlan`},
		{"vlan or ip", `"ip" at position 9 comes after vlan, so it looks behind a VLAN tag which need not be there`},
		{"not vlan and ip", `"ip" at position 14 comes after vlan`},
		{"vlan 5 or tcp port 80", `"tcp port 80" at position 20 comes after vlan`},
		{"not (vlan and ip) and tcp", `comes after vlan`},
		{"(vlan and ip) or arp", `comes after vlan`},
		{"arp or vlan and arp", `"arp" at position 17 comes after vlan`},
		{"vlan or tcp[13] = 2", `comes after vlan`},
		{strings.Repeat("(", 101) + "tcp" + strings.Repeat(")", 101), `more than 100 parentheses or nots`},
		{strings.Repeat("not ", 101) + "tcp", `more than 100 parentheses or nots`},
		{"port 1" + strings.Repeat(" or 1", 400), `instructions, 4096 are allowed: shorten it`},
	} {
		e, err := Parse(test.expr)
		if err == nil {
			t.Errorf("Parse(%.60q) gives %.60q, want an error", test.expr, e)
			continue
		}
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("Parse(%.60q): %q does not say %q", test.expr, err, test.want)
		}
		if strings.ContainsAny(err.Error(), "\n\r\x00\x1b") {
			t.Errorf("Parse(%.60q): %q is not one clean line", test.expr, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, expr := range accepted {
		f.Add(expr)
	}
	f.Add("not vlan and (ip or tcp[13:1] & (2|16) != 0) or 10.1/16")
	tuples := []Tuple{{}}
	for _, p := range handMade() {
		tuples = append(tuples, ParsePacket(p))
	}
	f.Fuzz(func(t *testing.T, expr string) {
		e, err := Parse(expr)
		if err != nil {
			return
		}
		insns := e.Instructions()
		checkJumps(t, insns)
		checkReparse(t, e)
		for i := range tuples {
			if got, err := run(insns, &tuples[i]); err != nil || got > 1 {
				t.Fatalf("%q: %d, %v", expr, got, err)
			}
		}
	})
}

func FuzzParsePacket(f *testing.F) {
	for _, p := range handMade() {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		tuple := ParsePacket(frame)
		if tuple.Len != uint32(len(frame)) || tuple.L4Avail > tuple.L3Avail {
			t.Errorf("%x: %+v", frame, tuple)
		}
	})
}

func ExampleParse() {
	e, err := Parse("tcp dst port 80 or 443 and not net 10")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	fmt.Println(e)
	// Output: (tcp dst port 80 or tcp dst port 443) and not net 10.0.0.0/8
}

// TestImports holds the rule of doc.go.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{join .Imports "\n"}}`, ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for _, path := range strings.Fields(string(out)) {
		if strings.Contains(path, ".") && path != "github.com/cilium/ebpf/asm" {
			t.Errorf("package filter imports %s", path)
		}
	}
}
