package symbolize

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Fixtures of nf_tables are rulesets as a kernel gave them: testdata/nft/SET.bin
// is the answers to NFT_MSG_GETGEN and to the dumps of tables, chains and rules,
// SET.list what nft printed, SET.PROGRAM.TABLE.save what the save programs did.
// They are made from testdata/rules/, in a VM, by
//
//	NFTRACE_CAPTURE=1 unshare -n symbolize.test -test.run TestCaptureNFT
func TestCaptureNFT(t *testing.T) {
	if os.Getenv("NFTRACE_CAPTURE") == "" {
		t.Skip("makes fixtures; wants root, a throwaway network namespace and NFTRACE_CAPTURE=1")
	}
	s, err := NewSystem()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := s.ResolveNetns("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for set, prog := range map[string][]string{
		"native": {"nft", "-f", "testdata/rules/nft-native.nft"},
		"compat": {"sh", "-e", "testdata/rules/nft-compat.sh"},
	} {
		for _, prog := range [][]string{{"nft", "flush", "ruleset"}, prog} {
			if out, err := exec.Command(prog[0], prog[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%q: %v: %s", prog, err, out)
			}
		}
		write := func(name string, b []byte) {
			t.Helper()
			if err := os.WriteFile(filepath.Join("testdata/nft", set+"."+name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		var r *NFTRuleset
		var raw []byte
		err := ns.netlink(unix.NETLINK_NETFILTER, func(c *netlink.Conn) error {
			r, err = rulesetNFT(func(m netlink.Message) ([]netlink.Message, error) {
				msgs, err := c.Execute(m)
				for _, m := range msgs {
					m.Header.PID, m.Header.Sequence = 0, 0
					b, err := m.MarshalBinary()
					if err != nil {
						return nil, err
					}
					raw = append(raw, b...)
				}
				return msgs, err
			}, nil)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		write("bin", raw)
		list, err := nftList()
		if err != nil {
			t.Fatal(err)
		}
		write("list", list)
		for _, tab := range r.Tables {
			if !tab.Compat {
				continue
			}
			save, err := nftSave(s, tab)
			if err != nil {
				t.Fatal(err)
			}
			// The save file names the time; the fixture does not.
			var kept []string
			for l := range strings.Lines(string(save)) {
				if !strings.HasPrefix(l, "#") {
					kept = append(kept, l)
				}
			}
			write(nftSavePrograms[tab.Family]+"."+tab.Name+".save", []byte(strings.Join(kept, "")))
		}
	}
}

// nftFixture serves testdata/nft/SET.bin as a kernel does.
func nftFixture(t testing.TB, set string) nftKernel {
	t.Helper()
	raw := nftFile(t, set+".bin")
	answers := map[netlink.HeaderType][]netlink.Message{}
	for len(raw) > 0 {
		n := binary.NativeEndian.Uint32(raw)
		var m netlink.Message
		if err := m.UnmarshalBinary(raw[:n]); err != nil {
			t.Fatal(err)
		}
		answers[m.Header.Type] = append(answers[m.Header.Type], m)
		raw = raw[n:]
	}
	return func(m netlink.Message) ([]netlink.Message, error) {
		if len(m.Data) != nfgenmsg || m.Header.Flags&netlink.Request == 0 {
			t.Fatalf("request %+v", m)
		}
		switch m.Header.Type {
		case nftType(unix.NFT_MSG_GETGEN):
			return answers[nftType(unix.NFT_MSG_NEWGEN)][:1], nil
		case nftType(unix.NFT_MSG_GETTABLE):
			return answers[nftType(unix.NFT_MSG_NEWTABLE)], nil
		case nftType(unix.NFT_MSG_GETCHAIN):
			return answers[nftType(unix.NFT_MSG_NEWCHAIN)], nil
		case nftType(unix.NFT_MSG_GETRULE):
			return answers[nftType(unix.NFT_MSG_NEWRULE)], nil
		}
		t.Fatalf("request %+v", m)
		return nil, nil
	}
}

func nftFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/nft", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// nftPrograms are readTexts' save and list, from a fixture.
func nftPrograms(t testing.TB, set string) (func(*NFTTable) ([]byte, error), func() ([]byte, error)) {
	return func(tab *NFTTable) ([]byte, error) {
			return nftFile(t, set+"."+nftSavePrograms[tab.Family]+"."+tab.Name+".save"), nil
		}, func() ([]byte, error) {
			return nftFile(t, set+".list"), nil
		}
}

func readFixture(t testing.TB, set string) *NFTRuleset {
	t.Helper()
	r, err := rulesetNFT(nftFixture(t, set), nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// findNFT finds a rule by "FAMILY TABLE CHAIN NUM".
func findNFT(t testing.TB, r *NFTRuleset, name string) *NFTRule {
	t.Helper()
	for _, tab := range r.Tables {
		for _, c := range tab.Chains {
			for _, rule := range c.Rules {
				if fmt.Sprintf("%s %s %s %d", nftFamilies[tab.Family], tab.Name, c.Name, rule.Num) == name {
					return rule
				}
			}
		}
	}
	t.Fatalf("no rule %s", name)
	return nil
}

func TestReadNFT(t *testing.T) {
	for set, want := range map[string]struct {
		tables []string
		chains map[string]string
	}{
		"native": {
			[]string{"inet fw", "ip nat2", "ip6 six", "bridge br", "arp a", "netdev nd", "inet empty", "ip filter", "inet dorm"},
			map[string]string{
				"inet fw input":     "filter hook 1 priority 0 policy 0 rules 23",
				"inet fw other":     "rules 0",
				"inet fw __chain20": "rules 2",
				"inet fw __chain21": "rules 1",
				"ip nat2 pre":       "nat hook 0 priority -100 policy 1 rules 3",
				"netdev nd ing":     "filter hook 0 priority -500 policy 1 rules 2",
				"ip6 six c":         "filter hook 0 priority -310 policy 1 rules 2",
				"ip filter forward": "filter hook 2 priority 0 policy 1 rules 0",
			},
		},
		"compat": {
			[]string{"ip filter compat", "ip nat compat", "ip mangle compat", "ip raw compat", "ip6 filter compat",
				"bridge filter compat", "bridge nat compat", "arp filter compat"},
			map[string]string{
				"ip filter FORWARD":  "filter hook 2 priority 0 policy 0 rules 6",
				"ip filter DOCKER":   "rules 1",
				"ip mangle OUTPUT":   "route hook 3 priority -150 policy 1 rules 1",
				"bridge filter Y":    "rules 3",
				"arp filter INPUT":   "filter hook 0 priority 0 policy 1 rules 1",
				"bridge nat OUTPUT":  "",
				"ip6 filter FORWARD": "filter hook 2 priority 0 policy 1 rules 0",
			},
		},
	} {
		r := readFixture(t, set)
		var tables []string
		chains := map[string]string{}
		for _, tab := range r.Tables {
			name := nftFamilies[tab.Family] + " " + tab.Name
			if r.Table(tab.Handle) != tab {
				t.Errorf("%s: not found by handle %d", name, tab.Handle)
			}
			for _, c := range tab.Chains {
				if c.Table != tab || r.Chain(tab.Handle, c.Handle) != c {
					t.Errorf("%s %s: not found by handle %d", name, c.Name, c.Handle)
				}
				s := fmt.Sprintf("rules %d", len(c.Rules))
				if c.Base {
					s = fmt.Sprintf("%s hook %d priority %d policy %d %s", c.Type, c.Hook, c.Priority, c.Policy, s)
				}
				chains[name+" "+c.Name] = s
				for i, rule := range c.Rules {
					if rule.Chain != c || rule.Num != i+1 || rule.Text != "" || r.Rule(tab.Handle, rule.Handle) != rule {
						t.Errorf("%s %s: rule %+v", name, c.Name, rule)
					}
				}
			}
			if tab.Compat {
				name += " compat"
			}
			tables = append(tables, name)
		}
		if !slices.Equal(tables, want.tables) || r.Gen == 0 {
			t.Errorf("%s: generation %d, tables %q", set, r.Gen, tables)
		}
		for c, s := range want.chains {
			if chains[c] != s {
				t.Errorf("%s: chain %s: %q, not %q", set, c, chains[c], s)
			}
		}
		if r.Table(0) != nil || r.Chain(1, 1<<40) != nil || r.Rule(1<<40, 1) != nil {
			t.Error("found what is not there")
		}
	}
}

func TestNFTRules(t *testing.T) {
	for _, tt := range []struct {
		set, rule     string
		unconditional bool
		target        string
		text, native  string
	}{
		{"native", "inet fw input 1", false, "", "ct state vmap { invalid : drop, established : accept, related : accept }", "[ct vmap @__map0]"},
		{"native", "inet fw input 2", false, "", `tcp dport { 22, 80, 443, 1000-2000 } counter accept comment "web \\ # handle 3"`,
			"[meta cmp payload lookup @__set0] counter accept"},
		{"native", "inet fw input 5", true, "", `counter name "cnt"`, "[objref]"},
		{"native", "inet fw input 6", false, "", `quota name "q" drop`, "[objref] drop"},
		{"native", "inet fw input 7", false, "log", `limit rate 10/second log prefix "lim # handle 2 " level info`, "[limit] log"},
		{"native", "inet fw input 8", false, "", `iifname "lo" jump { … }`, "[meta cmp] jump __chain20"},
		{"native", "inet fw __chain20 2", false, "", `udp dport 53 counter drop comment "in { here }"`, "[meta cmp payload cmp] counter drop"},
		{"native", "inet fw input 9", false, "", `iifname { "a", "b" } goto other`, "[meta lookup @__set1] goto other"},
		{"native", "inet fw input 12", false, "reject", "ip saddr 1.1.1.1 reject with icmpx admin-prohibited", "[meta cmp payload cmp] reject"},
		{"native", "inet fw input 13", false, "queue", "meta l4proto udp queue flags bypass to 3", "[meta cmp] queue"},
		{"native", "inet fw input 14", true, "", "meta mark set 0x00000001 accept", "[immediate meta set] accept"},
		{"native", "inet fw __chain21 1", true, "", "return", "return"},
		{"native", "inet fw input 20", true, "", "continue", "continue"},
		{"native", "inet fw input 21", true, "", `counter comment "only {"`, "counter"},
		{"native", "ip nat2 pre 1", false, "dnat", "tcp dport 80 dnat to 10.0.0.1:8080", "[meta cmp payload cmp immediate immediate] dnat"},
		{"native", "ip nat2 pre 2", false, "redirect", "tcp dport 81 redirect to :80", "[meta cmp payload cmp immediate] redirect"},
		{"native", "ip nat2 post 1", false, "masquerade", `oifname "eth0" masquerade`, "[meta cmp] masquerade"},
		{"native", "ip nat2 post 2", true, "snat", "snat to 1.2.3.4", "[immediate] snat"},
		{"native", "ip6 six c 2", true, "notrack", "notrack", "notrack"},
		{"native", "netdev nd ing 2", true, "fwd", `fwd to "lo"`, "[immediate] fwd"},
		{"native", "netdev nd multi 1", true, "dup", `counter dup to "lo"`, "counter [immediate] dup"},
		{"native", "ip filter INPUT 1", false, "", "ct state new accept", "[ct bitwise cmp] accept"},

		{"compat", "ip filter INPUT 1", true, "", "", ""},
		{"compat", "ip filter INPUT 2", false, "", `-m comment --comment "say \"hi\" \\ # handle 3" -j ACCEPT`,
			`-m comment --comment "say \"hi\" \\ # handle 3" -j ACCEPT`},
		{"compat", "ip filter INPUT 3", false, "LOG",
			`-p tcp -m multiport --dports 22,80 -m conntrack --ctstate NEW -m limit --limit 5/sec -j LOG --log-prefix "in: " --log-level 7`,
			`[meta cmp] -m multiport --dports 22,80 -m conntrack --ctstate NEW [limit] -j LOG --log-prefix "in: " --log-level 7`},
		{"compat", "ip filter INPUT 4", false, "NFLOG", "-p icmp -j NFLOG --nflog-prefix x --nflog-group 5", "[meta cmp] -j NFLOG …"},
		{"compat", "ip filter INPUT 6", false, "", "-m mark --mark 0x4000/0x4000 -g KUBE-FW", "[meta bitwise cmp] -g KUBE-FW"},
		{"compat", "ip filter INPUT 7", false, "REJECT", "-s 10.1.0.0/16 ! -i lo -p tcp -j REJECT --reject-with tcp-reset",
			"[meta cmp meta cmp payload cmp] -j REJECT --reject-with tcp-reset"},
		{"compat", "ip filter FORWARD 1", true, "", "-j DOCKER-USER", "-j DOCKER-USER"},
		{"compat", "ip filter DOCKER-USER 1", true, "", "-j RETURN", "-j RETURN"},
		{"compat", "ip nat POSTROUTING 1", false, "MASQUERADE", "-s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", "[meta cmp payload cmp] -j MASQUERADE"},
		{"compat", "ip nat DOCKER 2", false, "DNAT", "! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80", ""},
		{"compat", "ip raw PREROUTING 1", false, "TRACE", "-p tcp -m tcp --dport 80 -j TRACE", ""},
		{"compat", "ip6 filter INPUT 2", false, "REJECT", "-s fe80::/10 -j REJECT --reject-with icmp6-adm-prohibited",
			"[payload bitwise cmp] -j REJECT --reject-with icmp6-adm-prohibited"},
		{"compat", "bridge filter FORWARD 1", false, "", "-p IPv4 --ip-src 1.2.3.4 -j X", "[payload cmp] -m ip … -j X"},
		{"compat", "bridge filter X 1", true, "", "-j ACCEPT", "-j ACCEPT"},
		{"compat", "bridge filter Y 3", true, "", "-j DROP", "-j DROP"},
		{"compat", "bridge nat PREROUTING 1", true, "mark", "-j mark --mark-set 0x3 --mark-target CONTINUE", "-j mark …"},
		{"compat", "arp filter INPUT 1", false, "", "-j DROP -s 10.0.0.1", ""},
	} {
		r := readFixture(t, tt.set)
		rule := findNFT(t, r, tt.rule)
		texts := map[*NFTRule]string{}
		save, list := nftPrograms(t, tt.set)
		if err := r.readTexts(nftFixture(t, tt.set), texts, save, list); err != nil {
			t.Fatal(err)
		}
		if rule.Unconditional != tt.unconditional || rule.Target != tt.target || texts[rule] != tt.text ||
			tt.native != "" && rule.native != tt.native {
			t.Errorf("%s: unconditional %v, target %q, text\n%q\n%q", tt.rule, rule.Unconditional, rule.Target, texts[rule], rule.native)
		}
	}
}

// TestReadTexts puts the texts together again as the programs printed them.
func TestReadTexts(t *testing.T) {
	for _, set := range []string{"native", "compat"} {
		r := readFixture(t, set)
		save, list := nftPrograms(t, set)
		texts := map[*NFTRule]string{}
		if err := r.readTexts(nftFixture(t, set), texts, save, list); err != nil {
			t.Fatal(err)
		}
		for rule, s := range texts {
			rule.Text = s
		}
		if len(texts) != len(rulesOf(r)) {
			t.Errorf("%s: %d texts for %d rules", set, len(texts), len(rulesOf(r)))
		}
		compareNFT(t, r, save, nftFile(t, set+".list"))

		// Without the save programs all is nft's.
		clear(texts)
		none := func(*NFTTable) ([]byte, error) { return nil, errors.New("no such program") }
		if err := r.readTexts(nftFixture(t, set), texts, none, list); err != nil {
			t.Fatal(err)
		}
		for rule := range texts {
			rule.Chain.Table.Compat = false
			rule.Text = texts[rule]
		}
		if len(texts) != len(rulesOf(r)) {
			t.Errorf("%s: %d texts for %d rules", set, len(texts), len(rulesOf(r)))
		}
		compareNFT(t, r, nil, nftFile(t, set+".list"))
	}
}

var nftListRule = regexp.MustCompile(`(?m)^\t\t\s*([^\t}].*) # handle \d+$`)

// compareNFT compares the texts of a ruleset with what programs print: the rules
// with handles that nft lists, and the rules of the save programs, chain by chain.
func compareNFT(t *testing.T, r *NFTRuleset, save func(*NFTTable) ([]byte, error), list []byte) {
	t.Helper()
	listed := map[string]string{} // by table and handle
	table := ""
	for line := range strings.Lines(string(list)) {
		if strings.HasPrefix(line, "table ") {
			table, _, _ = strings.Cut(line, " {")
		}
		if m := nftListRule.FindStringSubmatch(line); m != nil {
			listed[table+line[strings.LastIndex(line, " "):len(line)-1]] = strings.TrimSpace(m[1])
		}
	}
	n := 0
	for _, tab := range r.Tables {
		name := nftFamilies[tab.Family] + " " + tab.Name
		for _, c := range tab.Chains {
			for _, rule := range c.Rules {
				want, ok := listed[fmt.Sprintf("table %s %d", name, rule.Handle)]
				if ok {
					n++
				}
				if !tab.Compat && ok != (!c.anonymous && !strings.HasSuffix(rule.Text, "{ … }")) || !tab.Compat && ok && want != rule.Text {
					t.Errorf("%s %s %d: %q, listed as %q", name, c.Name, rule.Num, rule.Text, want)
				}
			}
		}
		if !tab.Compat {
			continue
		}
		out, err := save(tab)
		if err != nil {
			t.Fatal(err)
		}
		saved, got := map[string][]string{}, map[string][]string{}
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(line, "-A ") {
				chain := strings.Fields(line)[1]
				saved[chain] = append(saved[chain], strings.TrimSuffix(line, "\n"))
			}
		}
		for _, c := range tab.Chains {
			for _, rule := range c.Rules {
				if !rule.ChainPolicy {
					got[c.Name] = append(got[c.Name], strings.TrimSuffix("-A "+c.Name+" "+rule.Text, " "))
				}
			}
		}
		if !reflect.DeepEqual(saved, got) {
			t.Errorf("%s:\n%q\nsaved\n%q", name, got, saved)
		}
	}
	if n != len(listed) {
		t.Errorf("%d of %d listed rules found", n, len(listed))
	}
}

// TestReadTextsFalls: what does not fit gives native texts to its table alone.
func TestReadTextsFalls(t *testing.T) {
	errNone := errors.New("no such program")
	for what, tt := range map[string]struct {
		list   func(string) (string, error)
		lost   string // the tables without texts
		reason string
	}{
		"no nft":         {func(s string) (string, error) { return "", errNone }, "all", "no such program"},
		"nothing":        {func(s string) (string, error) { return "", nil }, "all", "does not fit"},
		"other handle":   {change("# handle 34\n", "# handle 35\n"), "inet fw", "inet fw"},
		"no handle":      {change("\tdrop # handle 43\n", "\tdrop\n"), "inet fw", "line"},
		"rule missing":   {change("\t\tip saddr @bad counter drop # handle 15\n", ""), "inet fw", "input:3"},
		"rule twice":     {change("\t\tnotrack # handle 4\n", "\t\tnotrack # handle 4\n\t\tnotrack # handle 4\n"), "ip6 six", "ip6 six"},
		"newline":        {change("comment \"only {\"", "comment \"only\n{\""), "inet fw", "inet fw"},
		"forged end":     {change("comment \"only {\"", "comment \"only\n\t}\n}\ntable ip6 six { # handle 45\n"), "inet fw,ip6 six", "inet fw"},
		"forged rule":    {change("comment \"{ input\"", "comment \"\n\t\tdrop # handle 12\""), "inet fw", "inet fw"},
		"forged chain":   {change("comment \"set", "comment \"\n\t}\n\tchain other { # handle 1\n\t}\n"), "inet fw", "inet fw"},
		"other table":    {change("table arp a {", "table arp b {"), "arp a", "arp a"},
		"table twice":    {func(s string) (string, error) { return s + s, nil }, "all", "does not fit"},
		"unknown chain":  {change("\tchain ing {", "\tchain egr {"), "netdev nd", "egr"},
		"chain missing":  {change("\tchain post { # handle 2\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n\t\toifname \"eth0\" masquerade # handle 7\n\t\tsnat to 1.2.3.4 # handle 8\n\t}\n", ""), "ip nat2", "post:1"},
		"inner missing":  {change("\t\t\ttcp dport 22 accept\n", ""), "inet fw", "__chain20"},
		"inner more":     {change("\t\t\ttcp dport 22 accept\n", "\t\t\ttcp dport 22 accept\n\t\t\taccept\n"), "inet fw", "inet fw"},
		"multiple lines": {change("dport map { 90 : 10.0.0.9, ", "dport map { 90 : 10.0.0.9,\n\t\t\t     "), "ip nat2", "ip nat2"},
		"warnings":       {func(s string) (string, error) { return "# Warning: table x\n" + s, nil }, "", ""},
		"inner handles":  {change("\t\t\ttcp dport 22 accept\n", "\t\t\ttcp dport 22 accept # handle 20\n"), "", ""},
	} {
		r := readFixture(t, "native")
		texts := map[*NFTRule]string{}
		err := r.readTexts(nftFixture(t, "native"), texts, nil, func() ([]byte, error) {
			before := string(nftFile(t, "native.list"))
			s, err := tt.list(before)
			if s == before && err == nil {
				t.Errorf("%s: nothing changed", what)
			}
			return []byte(s), err
		})
		lost := map[string]bool{}
		for _, tab := range r.Tables {
			for _, c := range tab.Chains {
				for _, rule := range c.Rules {
					if _, ok := texts[rule]; !ok {
						lost[nftFamilies[tab.Family]+" "+tab.Name] = true
					} else if lost[nftFamilies[tab.Family]+" "+tab.Name] {
						t.Errorf("%s: some texts of table %s", what, tab.Name)
					}
				}
			}
		}
		got := strings.Join(slices.Sorted(maps.Keys(lost)), ",")
		if tt.lost == "all" && len(texts) == 0 {
			got = "all"
		}
		if got != tt.lost || (err == nil) != (tt.reason == "") || err != nil && !strings.Contains(err.Error(), tt.reason) {
			t.Errorf("%s: lost %s: %v", what, got, err)
		}
	}
}

func change(from, to string) func(string) (string, error) {
	return func(s string) (string, error) { return strings.Replace(s, from, to, 1), nil }
}

// TestReadTextsSave: a save program's output that does not fit is as none.
func TestReadTextsSave(t *testing.T) {
	for what, change := range map[string]func(string) (string, error){
		"incompatible": func(string) (string, error) { return "# Table `filter' is incompatible, use 'nft' tool.\n", nil },
		"rule missing": change("-A INPUT -p udp -j NFQUEUE --queue-num 3\n", ""),
		"rule more":    change("COMMIT", "-A INPUT -j DROP\nCOMMIT"),
		"other target": change("-j REJECT --reject-with tcp-reset", "-j DROP"),
		"other goto":   change("-g KUBE-FW", "-j KUBE-FW"),
		"no end":       change("COMMIT\n", ""),
	} {
		r := readFixture(t, "compat")
		texts := map[*NFTRule]string{}
		save, list := nftPrograms(t, "compat")
		err := r.readTexts(nftFixture(t, "compat"), texts, func(tab *NFTTable) ([]byte, error) {
			out, err := save(tab)
			if tab.Family != unix.NFPROTO_IPV4 || tab.Name != "filter" {
				return out, err
			}
			s, err := change(string(out))
			if s == string(out) {
				t.Errorf("%s: nothing changed", what)
			}
			return []byte(s), err
		}, list)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		for rule, want := range map[string]string{
			"ip filter FORWARD 1": "counter jump DOCKER-USER",
			"ip filter INPUT 2":   "counter accept",
			"ip nat DOCKER 1":     "-i docker0 -j RETURN",
		} {
			if got := texts[findNFT(t, r, rule)]; got != want {
				t.Errorf("%s: %s is %q, not %q", what, rule, got, want)
			}
		}
	}
}

// TestNFTChanges: a kernel whose ruleset changes.
func TestNFTChanges(t *testing.T) {
	fixture := nftFixture(t, "compat")
	gen := func(id uint32) []netlink.Message {
		b := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 0, 8, 0, unix.NFTA_GEN_ID, 0}, id)
		return []netlink.Message{{Header: netlink.Header{Type: nftType(unix.NFT_MSG_NEWGEN)}, Data: b}}
	}
	for what, tt := range map[string]struct {
		gen         func(i int) uint32
		interrupted int // dumps
		want        uint32
	}{
		"still":              {func(int) uint32 { return 7 }, 0, 7},
		"changes once":       {func(i int) uint32 { return min(uint32(i), 1) }, 0, 1},
		"interrupted":        {func(i int) uint32 { return 9 }, nftReads - 1, 9},
		"interrupted always": {func(i int) uint32 { return 9 }, 1000, 0},
		"changes always":     {func(i int) uint32 { return uint32(i) + 1 }, 0, 0},
	} {
		gens := 0
		kernel := func(m netlink.Message) ([]netlink.Message, error) {
			if m.Header.Type == nftType(unix.NFT_MSG_GETGEN) {
				gens++
				return gen(tt.gen(gens - 1)), nil
			}
			msgs, err := fixture(m)
			if tt.interrupted > 0 && m.Header.Type == nftType(unix.NFT_MSG_GETRULE) {
				tt.interrupted--
				msgs = slices.Clone(msgs)
				msgs[len(msgs)-1].Header.Flags |= netlink.DumpInterrupted
			}
			return msgs, err
		}
		r, err := rulesetNFT(kernel, nil)
		switch {
		case tt.want == 0:
			if !errors.Is(err, errNFTChanged) {
				t.Errorf("%s: %v", what, err)
			}
		case err != nil || r.Gen != tt.want:
			t.Errorf("%s: %+v, %v", what, r, err)
		}
	}

	// Texts of another generation are none.
	r := readFixture(t, "compat")
	save, list := nftPrograms(t, "compat")
	for changed := range 4 {
		asked := 0
		texts := map[*NFTRule]string{}
		err := r.readTexts(func(netlink.Message) ([]netlink.Message, error) {
			asked++
			if asked > changed {
				return gen(r.Gen + 1), nil
			}
			return gen(r.Gen), nil
		}, texts, save, list)
		if err == nil || !strings.Contains(err.Error(), "changed") {
			t.Errorf("%d: %v", changed, err)
		}
		// Tables come in the order of the fixture, each with a question after it.
		done := map[*NFTTable]bool{}
		for rule := range texts {
			done[rule.Chain.Table] = true
		}
		if want := max(changed-1, 0); len(done) != want {
			t.Errorf("texts of %d tables, not %d", len(done), want)
		}
	}

	r, err := rulesetNFT(func(netlink.Message) ([]netlink.Message, error) { return nil, unix.EPERM }, nil)
	if r != nil || !errors.Is(err, unix.EPERM) {
		t.Errorf("%v, %v", r, err)
	}
}

func TestNFTCompat(t *testing.T) {
	base := func(name, typ string, hook uint8, prio int32) *NFTChain {
		return &NFTChain{Name: name, Type: typ, Hook: hook, Priority: prio, Base: true}
	}
	input, other := base("INPUT", "filter", 1, 0), &NFTChain{Name: "other"}
	for what, tt := range map[string]struct {
		family uint8
		table  string
		chains []*NFTChain
		want   bool
	}{
		"iptables":             {2, "filter", []*NFTChain{input}, true},
		"iptables, user chain": {2, "filter", []*NFTChain{other, input}, true},
		"ip6tables":            {10, "filter", []*NFTChain{input}, true},
		"ip6tables nat":        {10, "nat", []*NFTChain{base("POSTROUTING", "nat", 4, 100)}, true},
		"ebtables":             {7, "filter", []*NFTChain{base("INPUT", "filter", 1, -200)}, true},
		"ebtables broute":      {7, "broute", []*NFTChain{base("BROUTING", "filter", 0, -1<<31)}, true},
		"arptables":            {3, "filter", []*NFTChain{base("OUTPUT", "filter", 1, 0)}, true},
		"no base chain":        {2, "filter", []*NFTChain{other}, false},
		"no chain":             {2, "filter", nil, false},
		"inet":                 {1, "filter", []*NFTChain{input}, false},
		"other table":          {2, "docker-bridges", []*NFTChain{input}, false},
		"other table's chain":  {2, "nat", []*NFTChain{input}, false},
		"other name":           {2, "filter", []*NFTChain{base("input", "filter", 1, 0)}, false},
		"one more base chain":  {2, "filter", []*NFTChain{input, base("early", "filter", 0, -10)}, false},
		"other priority":       {2, "filter", []*NFTChain{base("INPUT", "filter", 1, -1)}, false},
		"other hook":           {2, "filter", []*NFTChain{base("INPUT", "filter", 2, 0)}, false},
		"other type":           {2, "mangle", []*NFTChain{base("OUTPUT", "filter", 3, -150)}, false},
	} {
		if got := (&NFTTable{Family: tt.family, Name: tt.table, Chains: tt.chains}).compat(); got != tt.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func TestHasBuiltInModule(t *testing.T) {
	s, _ := fakeSystem(t)
	for name, b := range map[string]string{
		"modules": "xt_mark 16384 0 - Live 0x0\n",
		"kallsyms": "0000000000000000 d __initcall__kmod_xt_tcpudp__590_232_tcpudp_mt_init6\n" +
			"0000000000000000 d __initcall__kmod_ebtable_filter__601_119_ebtable_filter_init6\n",
	} {
		if err := os.WriteFile(filepath.Join(s.Proc, name), []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.BuiltIn = func(module string) bool { return module == "nf_tables" }
	for name, want := range map[string]bool{
		"xt_mark": true, "xt_tcpudp": true, "ebtable_filter": true, "nf_tables": true,
		"xt_mar": false, "tcpudp": false, "ebtable_nat": false, "x_tables": false,
	} {
		if got := s.hasModule(name); got != want || s.wouldLoad(name) == want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if err := os.Remove(filepath.Join(s.Proc, "modules")); err != nil {
		t.Fatal(err)
	}
	if s.wouldLoad("xt_limit") || s.hasModule("xt_mark") {
		t.Error("a kernel that cannot load modules has or loads some")
	}
}

func TestHasModule(t *testing.T) {
	for what, tt := range map[string]struct {
		modules, kallsyms string
		want              bool
	}{
		"loaded":      {"nf_nat 61440 1 nft_chain_nat, Live 0x0\nnf_tables 380928 5 nft_compat, Live 0x0\n", "", true},
		"not loaded":  {"nf_tables_set 1 1 - Live 0x0\n", "0000000000000000 t nft_do_chain_x\n", false},
		"built in":    {"", "0000000000000000 T nft_do_chain\n", true},
		"its symbols": {"", "0000000000000000 T nft_do_chain\t[nf_tables]\n", false},
	} {
		s, _ := fakeSystem(t)
		for name, b := range map[string]string{"modules": tt.modules, "kallsyms": tt.kallsyms} {
			if err := os.WriteFile(filepath.Join(s.Proc, name), []byte(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.hasModule("nf_tables"); got != tt.want {
			t.Errorf("%s: %v", what, got)
		}
		if tt.want {
			continue
		}
		ns := s.Namespaces()[0]
		r, err := ReadNFT(ns, nil)
		if err != nil || len(r.Tables) != 0 || r.ReadTexts(ns) != "" || r.Table(1) != nil {
			t.Errorf("%s: %+v, %v", what, r, err)
		}
	}
}

// TestNFTLookup: a set that a packet must not be in is told from one that it must be in.
func TestNFTLookup(t *testing.T) {
	for flags, want := range map[uint32]string{0: "[lookup @s]", unix.NFT_LOOKUP_F_INV: "[lookup != @s]"} {
		e := netlink.NewAttributeEncoder()
		e.ByteOrder = binary.BigEndian
		e.Nested(unix.NFTA_RULE_EXPRESSIONS, func(e *netlink.AttributeEncoder) error {
			e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
				e.String(unix.NFTA_EXPR_NAME, "lookup")
				e.Nested(unix.NFTA_EXPR_DATA, func(e *netlink.AttributeEncoder) error {
					e.String(unix.NFTA_LOOKUP_SET, "s")
					e.Uint32(unix.NFTA_LOOKUP_FLAGS, flags)
					return nil
				})
				return nil
			})
			return nil
		})
		b, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		m, err := parseNFTRule(append([]byte{unix.NFPROTO_INET, 0, 0, 0}, b...))
		if err != nil {
			t.Fatal(err)
		}
		if got := m.rule(&NFTTable{Family: unix.NFPROTO_INET}); got.native != want || got.Unconditional {
			t.Errorf("flags %d: %q, unconditional %v", flags, got.native, got.Unconditional)
		}
	}
}

func FuzzParseNFTRule(f *testing.F) {
	for i, set := range []string{"native", "compat"} {
		msgs, _ := nftFixture(f, set)(nftRequest(unix.NFT_MSG_GETRULE, netlink.Dump))
		for _, m := range msgs {
			f.Add(i == 1, m.Data)
		}
	}
	f.Fuzz(func(t *testing.T, compat bool, b []byte) {
		m, err := parseNFTRule(b)
		if err != nil {
			return
		}
		r := m.rule(&NFTTable{Family: b[0], Compat: compat})
		for i := range m.exprs {
			if e := &m.exprs[i]; r.Unconditional && (e.name == "cmp" || e.name == "lookup" || e.name == "match") {
				t.Fatalf("unconditional in spite of %s", e.name)
			}
		}
		if strings.ContainsAny(r.native, "\n\r") || len(m.exprs) == 0 && (!r.Unconditional || r.Target != "" || r.native != "") {
			t.Fatalf("%+v", r)
		}
	})
}

// FuzzNFTList: each text is in the list, in a line with its rule's handle.
func FuzzNFTList(f *testing.F) {
	f.Add(nftFile(f, "native.list"))
	r := readFixture(f, "native")
	f.Fuzz(func(t *testing.T, list []byte) {
		lists := splitNFTList(list, r.Tables)
		for _, tab := range r.Tables {
			texts, err := tab.mapList(lists[tab])
			if err != nil {
				continue
			}
			for _, c := range tab.Chains {
				for _, rule := range c.Rules {
					text, ok := texts[rule]
					line := text + fmt.Sprintf(" # handle %d\n", rule.Handle)
					if before, found := strings.CutSuffix(text, more+" }"); found {
						line = strings.TrimSpace(before) + "\n"
					} else if c.anonymous {
						line = text
					}
					if !ok || !strings.Contains(text, `\r`) && !bytes.Contains(list, []byte(line)) {
						t.Fatalf("%s:%d: %q", c.Name, rule.Num, text)
					}
				}
			}
		}
	})
}

// FuzzNFTSave: each text is in the output, in a line of its chain.
func FuzzNFTSave(f *testing.F) {
	f.Add(nftFile(f, "compat.iptables.filter.save"))
	f.Add(nftFile(f, "compat.iptables.nat.save"))
	r := readFixture(f, "compat")
	f.Fuzz(func(t *testing.T, save []byte) {
		for _, tab := range r.Tables[:2] {
			texts, err := tab.mapSave(save)
			if err != nil {
				continue
			}
			for _, c := range tab.Chains {
				for _, rule := range c.Rules {
					text, ok := texts[rule]
					if !ok || !strings.Contains(text, `\r`) && !bytes.Contains(save, []byte(text)) {
						t.Fatalf("%s:%d: %q", c.Name, rule.Num, text)
					}
				}
			}
		}
	})
}

// TestNFTForeign: rules that iptables-nft did not write, and what its save
// program would load.
func TestNFTForeign(t *testing.T) {
	x := func(names ...string) (list []nftExpr) {
		for _, n := range names {
			list = append(list, nftExpr{name: n})
		}
		return list
	}
	for what, tt := range map[string]struct {
		family uint8
		exprs  []nftExpr
		want   bool
	}{
		"iptables":          {2, x("payload", "bitwise", "cmp", "match", "counter", "immediate"), false},
		"target":            {10, x("meta", "cmp", "counter", "target"), false},
		"NFLOG":             {2, append(x("counter"), nftExpr{name: "log", group: true}), false},
		"ebtables among":    {7, x("payload", "lookup", "counter", "immediate"), false},
		"no counter":        {2, x("payload", "cmp", "immediate"), true},
		"set":               {2, x("payload", "lookup", "counter", "immediate"), true},
		"verdict map":       {7, append(x("payload", "counter"), nftExpr{name: "lookup", isVerdict: true}), true},
		"log":               {2, x("counter", "log"), true},
		"native":            {2, x("ct", "cmp", "counter", "immediate"), true},
		"native masquerade": {2, x("counter", "masq"), true},
	} {
		if got := (&nftRuleMsg{exprs: tt.exprs}).foreign(tt.family); got != tt.want {
			t.Errorf("%s: %v", what, got)
		}
	}

	r := readFixture(t, "compat")
	for _, rule := range rulesOf(r) {
		if rule.foreign {
			t.Errorf("%s:%d is foreign", rule.Chain.Name, rule.Num)
		}
	}
	findNFT(t, r, "ip nat DOCKER 1").foreign = true
	save, list := nftPrograms(t, "compat")
	texts := map[*NFTRule]string{}
	if err := r.readTexts(nftFixture(t, "compat"), texts, save, list); err != nil {
		t.Fatal(err)
	}
	for rule, want := range map[string]string{
		"ip nat PREROUTING 1":     "fib daddr type local counter jump DOCKER",
		"ip filter FORWARD 1":     "-j DOCKER-USER",
		"ip mangle OUTPUT 1":      "-j MARK --set-xmark 0x1/0xffffffff",
		"bridge filter Y 2":       "-s 02:00:00:00:00:01 -j DROP",
		"ip6 filter INPUT 1":      "-p ipv6-icmp -m icmp6 --icmpv6-type 135 -j ACCEPT",
		"arp filter OUTPUT 1":     "-j mangle --mangle-ip-s 10.0.0.9",
		"ip nat POSTROUTING 1":    `oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade`,
		"bridge nat PREROUTING 1": "-j mark --mark-set 0x3 --mark-target CONTINUE",
	} {
		if got := texts[findNFT(t, r, rule)]; got != want {
			t.Errorf("%s is %q, not %q", rule, got, want)
		}
	}

	s, _ := fakeSystem(t)
	if err := os.WriteFile(filepath.Join(s.Proc, "modules"), []byte("nft_compat 16384 0 - Live 0x0\nxt_mark 16384 0 - Live 0x0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for rule, want := range map[string][]string{
		"ip filter INPUT 3":    {"xt_limit"},
		"ip filter INPUT 6":    {"xt_mark"},
		"ip filter FORWARD 3":  nil,
		"ip raw PREROUTING 1":  {"xt_tcpudp", "xt_TRACE"},
		"ip nat POSTROUTING 1": nil,
	} {
		if got := findNFT(t, r, rule).modules; !slices.Equal(got, want) {
			t.Errorf("%s: modules %q, not %q", rule, got, want)
		}
	}
	if _, err := nftSave(s, findNFT(t, r, "ip filter INPUT 3").Chain.Table); err == nil || !strings.Contains(err.Error(), "would load") {
		t.Errorf("the save program ran: %v", err)
	}
}

// rulesOf are the rules of all tables, in their order.
func rulesOf(r *NFTRuleset) []*NFTRule {
	var rules []*NFTRule
	for _, t := range r.Tables {
		for _, c := range t.Chains {
			rules = append(rules, c.Rules...)
		}
	}
	return rules
}

func rulesetNFT(ask nftKernel, idle func() (bool, error)) (*NFTRuleset, error) {
	m, gen, err := readNFT(ask, idle)
	if err != nil {
		return nil, err
	}
	return m.ruleset(gen)
}
