package symbolize

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

// TestRuleText compares every rule of every fixture with iptables-save's own text.
func TestRuleText(t *testing.T) {
	exact, short := 0, 0
	for _, name := range fixtureNames(t) {
		f := loadFixture(t, name)
		texts, err := f.table.mapTexts([]byte(f.save))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i, want := range texts {
			got := f.table.RuleText(i)
			if got == want {
				if want != "" {
					exact++
				}
				continue
			}
			// Each "…" may stand for options, nothing else may differ.
			parts := strings.Split(got, " "+more)
			rest, ok := want, len(parts) > 1
			for _, p := range parts {
				at := strings.Index(rest, p)
				if at < 0 {
					ok = false
					break
				}
				rest = rest[at+len(p):]
			}
			short++
			if !ok {
				t.Errorf("%s: entry %d:\n got %s\nwant %s", name, i, got, want)
			}
		}
	}
	t.Logf("%d exact, %d shortened", exact, short)
	if exact < 3*short {
		t.Errorf("%d rules exact, %d shortened", exact, short)
	}
}

// What the bytes of a match mean depends on the table's family, and on which match it is.
func TestMatchText(t *testing.T) {
	ranges := func(lo, hi string) []byte { // struct xt_iprange_mtinfo: --src-range
		b := make([]byte, 68)
		copy(b, netip.MustParseAddr(lo).AsSlice())
		copy(b[16:], netip.MustParseAddr(hi).AsSlice())
		b[64] = 1
		return b
	}
	for _, tt := range []struct {
		match  Match
		family Family
		want   string
	}{
		{Match{Name: "iprange", Revision: 1, Data: ranges("10.0.0.1", "10.0.0.9")}, IPv4, "--src-range 10.0.0.1-10.0.0.9"},
		{Match{Name: "iprange", Revision: 1, Data: ranges("fd00::1", "fd00::9")}, IPv6, "--src-range fd00::1-fd00::9"},
		{Match{Name: "iprange", Revision: 1, Data: ranges("2001:db8::", "2001:dff::")}, IPv6, "--src-range 2001:db8::-2001:dff::"},
		{Match{Name: "state", Data: []byte{1<<6 | 8, 0, 0, 0}}, IPv4, "--state NEW,UNTRACKED"},
		{Match{Name: "state", Data: []byte{1<<7 | 2, 0, 0, 0}}, IPv4, "--state ESTABLISHED,…"},
	} {
		name, opts, ok := matchText(&tt.match, tt.family)
		if name != tt.match.Name || opts != tt.want || !ok {
			t.Errorf("%s of %v: %q, %q, %v, want %q", tt.match.Name, tt.family, name, opts, ok, tt.want)
		}
	}
}

func TestMapTextsRefuses(t *testing.T) {
	f := loadFixture(t, "docker.v4.filter")
	for what, change := range map[string]func(string) string{
		"nothing":      func(s string) string { return "" },
		"rule missing": func(s string) string { return strings.Replace(s, "-A DOCKER-USER -j RETURN\n", "", 1) },
		"rule twice":   func(s string) string { return strings.Replace(s, "COMMIT", "-A DOCKER-USER -j RETURN\nCOMMIT", 1) },
		"other target": func(s string) string {
			return strings.Replace(s, "-A DOCKER-USER -j RETURN", "-A DOCKER-USER -j DROP", 1)
		},
		"other chain": func(s string) string { return strings.Replace(s, "-A DOCKER-USER -j RETURN", "-A X -j RETURN", 1) },
		"swapped": func(s string) string {
			return strings.Replace(s, "-A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-ISOLATION-STAGE-1", "-A FORWARD -j DOCKER-ISOLATION-STAGE-1\n-A FORWARD -j DOCKER-USER", 1)
		},
		"open quote": func(s string) string {
			return strings.Replace(s, "-A DOCKER-USER -j RETURN", "-A DOCKER-USER -j RETURN \"", 1)
		},
		"other table":     func(s string) string { return strings.Replace(s, "*filter", "*nat", 1) },
		"second table":    func(s string) string { return s + s },
		"no end":          func(s string) string { return strings.Replace(s, "COMMIT", "", 1) },
		"unknown chain":   func(s string) string { return strings.Replace(s, ":DOCKER ", ":DOCKED ", 1) },
		"a line to spare": func(s string) string { return strings.Replace(s, "COMMIT", "hello\nCOMMIT", 1) },
	} {
		if s := change(f.save); s == f.save {
			t.Errorf("%s: nothing changed", what)
		} else if texts, err := f.table.mapTexts([]byte(s)); !errors.Is(err, errTexts) {
			t.Errorf("%s: %v %v", what, texts, err)
		}
	}
}

func TestSameRules(t *testing.T) {
	family, info, _, blob := fixtureBytes(t, "six.v6.filter")
	tab, err := ParseTable(family, "filter", info, blob)
	if err != nil {
		t.Fatal(err)
	}
	for at := range blob {
		other := append([]byte(nil), blob...)
		other[at] ^= 1
		in := at
		for i := range tab.Entries {
			if tab.Entries[i].Offset <= at {
				in = at - tab.Entries[i].Offset
			}
		}
		if want := in >= 136 && in < 140 || in >= 144 && in < 168; sameRules(family, blob, other, tab) != want {
			t.Fatalf("byte %d of an entry: same is %v", in, !want)
		}
	}
}
