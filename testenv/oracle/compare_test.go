package oracle

import (
	"slices"
	"strings"
	"testing"
)

const (
	in   = " IN=docker0 OUT= PHYSIN=vethc2 MAC=02:00 SRC=172.17.0.3 DST=172.17.0.2 LEN=84 TOS=0x00 PREC=0x00 TTL=64 "
	icmp = " DF PROTO=ICMP TYPE=8 CODE=0 ID=131 SEQ=1 "
)

func ping(rule, id string) string { return "TRACE: " + rule + in + "ID=" + id + icmp }

var twoPings = []string{
	ping("raw:PREROUTING:policy:1", "7"),
	ping("mangle:PREROUTING:policy:1", "7"),
	ping("nat:PREROUTING:policy:2", "7"),
	ping("raw:PREROUTING:policy:1", "8"),
	ping("mangle:PREROUTING:policy:1", "8"),
}

func TestCompareAccepts(t *testing.T) {
	for name, tool := range map[string][]string{
		"the same":        slices.Clone(twoPings),
		"no blank at end": {strings.TrimSpace(twoPings[0]), twoPings[1], twoPings[2], twoPings[3], strings.TrimSpace(twoPings[4])},
		"packets mixed":   {twoPings[3], twoPings[0], twoPings[4], twoPings[1], twoPings[2]},
	} {
		if err := Compare(twoPings, tool); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every way in which a trace can be wrong must be found.
func TestCompareFindsPlantedErrors(t *testing.T) {
	for name, plant := range map[string]func([]string) []string{
		"missing line":    func(l []string) []string { return slices.Delete(l, 1, 2) },
		"missing packet":  func(l []string) []string { return l[:3] },
		"nothing at all":  func([]string) []string { return nil },
		"line twice":      func(l []string) []string { return append(l, l[2]) },
		"wrong rule":      func(l []string) []string { l[2] = strings.Replace(l[2], "policy:2", "rule:1", 1); return l },
		"wrong number":    func(l []string) []string { l[2] = strings.Replace(l[2], "policy:2", "policy:3", 1); return l },
		"wrong field":     func(l []string) []string { l[2] = strings.Replace(l[2], "TTL=64", "TTL=63", 1); return l },
		"foreign line":    func(l []string) []string { return append(l, ping("filter:FORWARD:rule:1", "9")) },
		"order in packet": func(l []string) []string { l[0], l[1] = l[1], l[0]; return l },
		"other packet's line": func(l []string) []string {
			l[2] = strings.Replace(l[2], "ID=7", "ID=8", 1)
			return l
		},
		"no TRACE line": func(l []string) []string { return append(l, "hello") },
	} {
		if err := Compare(twoPings, plant(slices.Clone(twoPings))); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

// NAT changes the addresses within a packet; the order across that counts, too.
func TestCompareOrderAcrossNAT(t *testing.T) {
	kernel := []string{
		"TRACE: nat:PREROUTING:rule:1 IN=eth0 OUT= SRC=10.211.55.1 DST=10.211.55.8 LEN=60 ID=5 PROTO=TCP SPT=4000 DPT=8080 SEQ=1 ACK=0 SYN",
		"TRACE: filter:FORWARD:rule:4 IN=eth0 OUT=docker0 SRC=10.211.55.1 DST=172.17.0.2 LEN=60 ID=5 PROTO=TCP SPT=4000 DPT=80 SEQ=1 ACK=0 SYN",
	}
	if err := Compare(kernel, kernel); err != nil {
		t.Error(err)
	}
	if err := Compare(kernel, []string{kernel[1], kernel[0]}); err == nil {
		t.Error("swapped lines were not found")
	}
}

// A copy made by TEE goes its way in the middle of its original's; a tool may
// print one after the other.
func TestCompareCopies(t *testing.T) {
	sent := func(rule string) string {
		return strings.Replace(ping(rule, "7"), "IN=docker0 OUT= PHYSIN=vethc2", "IN= OUT=docker0", 1)
	}
	kernel := []string{ping("mangle:PREROUTING:rule:1", "7"), sent("raw:OUTPUT:policy:1"), sent("mangle:OUTPUT:policy:1"), ping("mangle:PREROUTING:policy:2", "7")}
	if err := Compare(kernel, []string{kernel[0], kernel[3], kernel[1], kernel[2]}); err != nil {
		t.Error(err)
	}
	if err := Compare(kernel, []string{kernel[0], kernel[3], kernel[2], kernel[1]}); err == nil {
		t.Error("swapped lines of the copy were not found")
	}
	got, err := Packets(kernel)
	if err != nil || len(got) != 2 || len(got[0].Rules) != 2 || len(got[1].Rules) != 2 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestPackets(t *testing.T) {
	got, err := Packets(twoPings)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || len(got[0].Rules) != 3 || len(got[1].Rules) != 2 {
		t.Errorf("got %+v", got)
	}
	// The same packet once more, alike in all fields, is another one.
	got, err = Packets(append(slices.Clone(twoPings[:3]), twoPings[:3]...))
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || !slices.Equal(got[0].Rules, got[1].Rules) {
		t.Errorf("got %+v", got)
	}
	// Raw may have several lines.
	got, err = Packets([]string{ping("raw:PREROUTING:rule:1", "7"), ping("raw:A:return:1", "7"), ping("raw:PREROUTING:policy:2", "7")})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 {
		t.Errorf("got %+v", got)
	}
}

func TestParseRecord(t *testing.T) {
	seq, text, err := parseRecord([]byte("4,339,5140900,-;TRACE: raw:a:b:1 SEQ=1 \n SUBSYSTEM=x\n"))
	if err != nil || seq != 339 || text != "TRACE: raw:a:b:1 SEQ=1 " {
		t.Errorf("got %d, %q, %v", seq, text, err)
	}
	for _, bad := range []string{"", "x", "4,x,1,-;t", "4,1;t"} {
		if _, _, err := parseRecord([]byte(bad)); err == nil {
			t.Errorf("%q was taken for a record", bad)
		}
	}
}

func FuzzParseLine(f *testing.F) {
	f.Add(twoPings[0])
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLine(s)
		if err == nil && !strings.HasPrefix(l.Text, "TRACE: ") {
			t.Errorf("%q gave %q", s, l.Text)
		}
	})
}

func TestMixed(t *testing.T) {
	lines := func(s string) []Line {
		var out []Line
		for _, f := range strings.Fields(s) {
			out = append(out, Line{Text: f, Rule: f})
		}
		return out
	}
	for _, tt := range []struct {
		kernel, tool string
		want         bool
	}{
		{"a b x a b c y", "a b x y a b c", true}, // the copy began within the original
		{"a b x a b c y", "a b c a b x y", true}, // and was printed first
		{"a b x a b c y", "a b y x a b c", false},
		{"a b x a c b y", "a b x y a b c", false},
		{"a b c", "a b c", false}, // one packet
		{"a b c d", "a b d c", false},
		{"a b a c", "a b a", false},
	} {
		if got := mixed(lines(tt.kernel), lines(tt.tool)); got != tt.want {
			t.Errorf("kernel %q, tool %q: %v, want %v", tt.kernel, tt.tool, got, tt.want)
		}
	}
}

func TestSameOwners(t *testing.T) {
	const in = "TRACE: filter:INPUT:policy:1 IN=eth0 OUT= SRC=10.0.0.1 DST=10.0.0.2 PROTO=TCP SPT=1 DPT=2"
	const next = "TRACE: filter:INPUT:policy:1 IN=eth0 OUT= SRC=10.0.0.1 DST=10.0.0.2 ID=7 PROTO=TCP SPT=1 DPT=2"
	const rule = "TRACE: filter:INPUT:rule:1 IN=eth0 OUT= SRC=10.0.0.1 DST=10.0.0.2 PROTO=TCP SPT=1 DPT=2"
	const out = "TRACE: filter:OUTPUT:policy:1 IN= OUT=eth0 SRC=10.0.0.2 DST=10.0.0.1 PROTO=TCP SPT=2 DPT=1"
	const owner = " UID=0 GID=0"
	for _, tt := range []struct {
		name         string
		kernel, tool []string
		want         []string
		n            int
	}{
		{"accepted meanwhile", []string{in + owner}, []string{in}, []string{in + owner}, 1},
		{"closed meanwhile", []string{in}, []string{in + owner}, []string{in}, 1},
		{"with a mark", []string{in + owner + " MARK=0x3"}, []string{in + " MARK=0x3"}, []string{in + owner + " MARK=0x3"}, 1},
		{"with another mark", []string{in + owner + " MARK=0x3"}, []string{in + " MARK=0x4"}, []string{in + " MARK=0x4"}, 0},
		{"another owner with another mark", []string{in + owner + " MARK=0x3"}, []string{in + " UID=1 GID=1 MARK=0x4"}, []string{in + " UID=1 GID=1 MARK=0x4"}, 0},
		{"two lines of one packet", []string{rule + owner, in + owner}, []string{rule, in}, []string{rule + owner, in + owner}, 1},
		{"two packets", []string{next + owner, in + owner}, []string{next, in}, []string{next + owner, in + owner}, 2},
		{"the same", []string{in, in + owner}, []string{in + owner, in}, []string{in + owner, in}, 0},
		{"a sender's owner", []string{out + owner}, []string{out}, []string{out}, 0},
		{"another line", []string{in + owner}, []string{in + " X"}, []string{in + " X"}, 0},
		{"one too many", []string{in}, []string{in, in + owner}, []string{in, in + owner}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, n := SameOwners(tt.kernel, tt.tool)
			if !slices.Equal(got, tt.want) || n != tt.n {
				t.Errorf("%q, %d; want %q, %d", got, n, tt.want, tt.n)
			}
		})
	}
}
