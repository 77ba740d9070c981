package oracle

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// testRuleset has one table of inet with base chains early and fwd at forward, and user
// chains u and v; and one of iptables-nft.
func testRuleset() *NFTRuleset {
	rs := &NFTRuleset{
		Compat: map[string]bool{"ip filter": true},
		chains: map[nftChainKey]*nftChain{},
		rules:  map[nftRuleKey]*nftRule{},
	}
	add := func(family, table, chain, hook string, handles ...uint64) {
		rs.chains[nftChainKey{family, table, chain}] = &nftChain{hook: hook, rules: len(handles)}
		for i, h := range handles {
			// Every rule with an even handle is unconditional.
			rs.rules[nftRuleKey{family, table, h}] = &nftRule{chain: chain, number: i + 1, always: h%2 == 0}
		}
	}
	add("inet", "t", "early", "FORWARD")
	add("inet", "t", "fwd", "FORWARD", 5, 9, 7, 8)
	add("inet", "t", "u", "", 11, 12)
	add("inet", "t", "v", "", 13)
	add("ip", "filter", "FORWARD", "FORWARD", 21, 22, 24)
	add("ip", "filter", "U", "", 32, 34)
	return rs
}

// message is an event in short: "chain handle verdict [target]"; handle policy is that.
func message(t *testing.T, family, table string, id uint32, text string, later bool) NFTEvent {
	t.Helper()
	f := strings.Fields(text)
	e := NFTEvent{Family: family, Table: table, Chain: f[0], Type: traceTypeRule, ID: id, PF: unix.NFPROTO_IPV4}
	codes := map[string]int32{"DROP": 0, "ACCEPT": 1, "STOLEN": 2, "QUEUE": 7<<16 | 0x8003, "continue": -1, "jump": -3, "goto": -4, "RETURN": -5}
	e.Code = codes[f[2]]
	if len(f) > 3 {
		e.Target = f[3]
	}
	if f[1] == "policy" {
		e.Type, e.Policy, e.Code = traceTypePolicy, uint32(e.Code), 0
	} else if _, err := fmt.Sscan(f[1], &e.Handle); err != nil {
		t.Fatal(err)
	}
	if !later && (e.Handle == 0 && e.Type == traceTypeRule || e.Code == unix.NFT_RETURN) {
		e.Type = traceTypeReturn // up to 6.11
	}
	return e
}

// begin gives an event what only the first of a base chain has.
func begin(e NFTEvent, ipid uint16) NFTEvent {
	n := make([]byte, 20)
	n[0], n[9] = 0x45, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(n[2:], 84)
	binary.BigEndian.PutUint16(n[4:], ipid)
	copy(n[12:], []byte{172, 17, 0, 3, 172, 17, 0, 2})
	e.Network, e.Transport = n, []byte{0, 7, 0, 53, 0, 64, 0, 0}
	e.In, e.Out = 2, 3
	return e
}

func messages(t *testing.T, family, table string, id uint32, ipid uint16, later bool, text ...string) (out []NFTEvent) {
	for i, s := range text {
		e := message(t, family, table, id, s, later)
		if i == 0 {
			e = begin(e, ipid)
		}
		out = append(out, e)
	}
	return out
}

func TestNFTRuns(t *testing.T) {
	native := []string{
		"fwd 5 continue", "fwd 9 jump u", "u 11 jump v", "v 13 continue", "v 0 continue", "u 12 RETURN",
		"fwd 7 goto u", "u 0 continue", "fwd policy DROP",
	}
	wantNative := []string{
		"inet:t:fwd:rule:1 continue 5 0", "inet:t:fwd:rule:2 jump u 9 0", "inet:t:u:rule:1 jump v 11 1", "inet:t:v:rule:1 continue 13 2",
		"inet:t:v:return:2 RETURN 0 2", "inet:t:u:rule:2 RETURN 12 1", "inet:t:fwd:rule:3 goto u 7 0", "inet:t:u:return:3 RETURN 0 1",
		"inet:t:fwd:policy:5 DROP 0 0",
	}
	compat := []string{"FORWARD 21 jump U", "U 32 continue", "U 34 RETURN", "FORWARD 22 ACCEPT"}
	wantCompat := []string{
		"filter:FORWARD:rule:1 jump U 21 0", "filter:U:rule:1 continue 32 1", "filter:U:return:2 RETURN 34 1", "filter:FORWARD:policy:2 ACCEPT 22 0",
	}
	for _, later := range []bool{false, true} {
		// Two packets, the second within the first.
		a := messages(t, "inet", "t", 1, 1, later, native...)
		b := messages(t, "ip", "filter", 2, 2, later, compat...)
		events := slices.Concat(a[:3], b, a[3:], messages(t, "inet", "t", 1, 1, later, "fwd 9 jump u", "u 0 continue", "fwd 0 continue", "fwd policy ACCEPT"))
		runs, err := testRuleset().Runs(events)
		if err != nil {
			t.Fatal(err)
		}
		var got [][]string
		for _, r := range runs {
			var lines []string
			for _, l := range r.Rules {
				lines = append(lines, fmt.Sprintf("%s %s %d %d", l.Trace, l.Action, l.Handle, l.Depth))
			}
			got = append(got, lines)
		}
		if len(runs) != 3 || !slices.Equal(got[0], wantNative) || !slices.Equal(got[1], wantCompat) || runs[0].Verdict != "DROP" || runs[1].Verdict != "ACCEPT" {
			t.Errorf("later %v: %s\n%+v", later, strings.Join(slices.Concat(got...), "\n"), runs)
		}
		if p := runs[0].Packet; p.Key != "ip 172.17.0.3 > 172.17.0.2, 84 bytes, protocol 17, ports 7 > 53" || !strings.Contains(p.Identity, "id 1,") {
			t.Errorf("%+v", p)
		}
	}
	m := func(text ...string) []NFTEvent { return messages(t, "inet", "t", 1, 1, true, text...) }
	for name, events := range map[string][]NFTEvent{
		"no beginning":         m("fwd 5 continue", "fwd 7 ACCEPT")[1:],
		"no end":               m("fwd 5 continue"),
		"a second beginning":   append(m("fwd 5 continue"), m("fwd policy ACCEPT")...),
		"unknown rule":         m("fwd 6 ACCEPT"),
		"rule of another":      m("fwd 11 ACCEPT"),
		"begins in user chain": m("u 11 ACCEPT"),
		"unknown chain":        m("fwd 5 jump w", "w 0 continue", "fwd policy ACCEPT"),
		"a verdict, no rule":   m("fwd 0 ACCEPT"),
	} {
		if runs, err := testRuleset().Runs(events); err == nil {
			t.Errorf("%s: %+v", name, runs)
		}
	}
}

// As legacy TRACE: an unconditional verdict is the policy in a base chain, a return elsewhere.
func TestNFTCompatTypes(t *testing.T) {
	for _, tt := range []struct{ table, text, want string }{
		{"filter", "FORWARD 22 DROP", "policy"}, {"filter", "FORWARD 21 DROP", "rule"}, {"filter", "FORWARD 24 continue", "rule"},
	} {
		runs, err := testRuleset().Runs(messages(t, "ip", tt.table, 1, 1, true, tt.text, "FORWARD policy ACCEPT")[:1+strings.Count(tt.text, "continue")])
		if err != nil || runs[0].Rules[0].Type != tt.want || runs[0].Rules[0].IsPolicy {
			t.Errorf("%s: %+v, %v, want %s", tt.text, runs, err, tt.want)
		}
	}
	native, err := testRuleset().Runs(messages(t, "inet", "t", 1, 1, true, "fwd 8 DROP"))
	if err != nil || native[0].Rules[0].Type != "rule" {
		t.Errorf("native: %+v, %v", native, err)
	}
}

func TestParseNFTEvent(t *testing.T) {
	enc := netlink.NewAttributeEncoder()
	enc.ByteOrder = binary.BigEndian
	enc.String(traceTable, "t")
	enc.String(traceChain, "c")
	enc.Uint64(traceHandle, 77)
	enc.Uint32(traceType, traceTypeRule)
	enc.Nested(traceVerdict, func(e *netlink.AttributeEncoder) error {
		e.Int32(verdictCode, -3)
		e.String(verdictChain, "u")
		return nil
	})
	enc.Uint32(traceID, 9)
	enc.Bytes(traceNetwork, []byte{1, 2})
	enc.Uint32(traceIIF, 4)
	enc.Uint32(traceNFProto, 10)
	data, err := enc.Encode()
	if err != nil {
		t.Fatal(err)
	}
	data = append([]byte{unix.NFPROTO_INET, 0, 0, 0}, data...)
	e, err := parseNFTEvent(data)
	want := NFTEvent{Family: "inet", Table: "t", Chain: "c", Handle: 77, Type: 3, Code: -3, Target: "u", ID: 9, In: 4, PF: 10, Network: []byte{1, 2}}
	if err != nil || fmt.Sprint(e) != fmt.Sprint(want) {
		t.Errorf("%+v, %v", e, err)
	}
	for n := range len(data) {
		parseNFTEvent(data[:n]) // and does not panic
	}
	if _, err := parseNFTEvent(data[:4]); err == nil {
		t.Error("nothing was taken for an event")
	}
}

func FuzzParseNFTEvent(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 5, 0, 1, 0, 't', 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := parseNFTEvent(data)
		if err == nil && (e.Table == "" || e.Type == 0) {
			t.Errorf("%+v", e)
		}
		nftPacket(data, data)
	})
}

// twoPackets are two packets through two base chains at one hook, alike but for the IP ID,
// and one through a table of iptables-nft; then nftrace's objects of them.
func twoPackets(t *testing.T) (kernel []NFTRun, objects []map[string]any) {
	var events []NFTEvent
	for id := range uint32(2) {
		events = slices.Concat(events,
			messages(t, "inet", "t", id, uint16(id), true, "early policy ACCEPT"),
			messages(t, "inet", "t", id, uint16(id), true, "fwd 5 continue", "fwd 9 jump u", "u 12 RETURN", "fwd 7 jump u", "u 0 continue", "fwd 8 DROP"))
	}
	events = append(events, messages(t, "ip", "filter", 3, 3, true, "FORWARD 21 jump U", "U 34 RETURN", "FORWARD policy ACCEPT")...)
	kernel, err := testRuleset().Runs(events)
	if err != nil {
		t.Fatal(err)
	}
	for i, runs := range [][]NFTRun{kernel[:2], kernel[2:4], kernel[4:]} {
		objects = append(objects, nftObjectOf(uint64(i+1), runs))
	}
	return kernel, objects
}

// Packets that came before the oracle's table are not the kernel's either; half of a packet is
// told in any case.
func TestParseNFTUnmarked(t *testing.T) {
	kernel, objects := twoPackets(t)
	for _, o := range objects {
		steps := o["steps"].([]any)
		o["steps"] = slices.DeleteFunc(steps, func(s any) bool {
			table, _ := s.(map[string]any)["table"].(map[string]any)
			return table["name"] == NFTTable
		})
	}
	if err := compareObjects(t, nil, objects, ""); err != nil {
		t.Error(err)
	}
	if err := compareObjects(t, kernel, objects, ""); err == nil {
		t.Error("packets that the kernel has were left out")
	}
	// But for pieces of packets that met it.
	for _, o := range objects {
		for _, s := range o["steps"].([]any) {
			s.(map[string]any)["reinjected"] = true
		}
	}
	if err := compareObjects(t, kernel, objects, ""); err != nil {
		t.Errorf("pieces: %v", err)
	}
	if err := compareObjects(t, nil, objects, ""); err == nil {
		t.Error("pieces that the kernel does not have were left out")
	}
	objects[0]["half_seen"] = "why"
	if err := compareObjects(t, nil, objects, ""); err == nil {
		t.Error("half a packet was left out")
	}
}

// nftObjectOf makes nftrace's object of a packet.
func nftObjectOf(id uint64, runs []NFTRun) map[string]any {
	packet := map[string]any{"family": "ip", "length": 84, "src": "172.17.0.3", "dst": "172.17.0.2", "proto": 17, "sport": 7, "dport": 53,
		"tcp_flags": []any{}, "icmp_type": nil, "icmp_code": nil, "frag_off": nil}
	steps := []any{map[string]any{"kind": "hook", "table": nil, "in": nil, "out": nil},
		map[string]any{"kind": "table", "netns_name": "c1", "table": map[string]any{"engine": "nf_tables", "name": "elsewhere"}},
		map[string]any{"kind": "table", "netns_name": "h", "table": map[string]any{"engine": "xtables", "name": "raw"}},
		map[string]any{"kind": "table", "netns_name": "h", "table": map[string]any{"engine": "nf_tables", "name": NFTTable}}}
	for _, r := range runs {
		var rules []any
		for _, l := range r.Rules {
			rules = append(rules, map[string]any{"trace": l.Trace, "chain": l.Chain, "type": l.Type, "number": l.Number, "handle": l.Handle,
				"is_policy": l.IsPolicy, "is_end": l.IsEnd, "action": l.Action, "depth": l.Depth, "text": "counter"})
		}
		steps = append(steps, map[string]any{"kind": "table", "netns_name": "h", "family": r.PF, "hook": r.Hook, "verdict": r.Verdict,
			"in": map[string]any{"index": r.In, "name": "eth0"}, "out": map[string]any{"index": r.Out, "name": "docker0"},
			"table": map[string]any{"name": r.Table, "engine": "nf_tables", "family": r.Family, "base_chain": r.Chain, "compat": r.Compat,
				"unresolved": "", "before": maps.Clone(packet), "rules": rules}})
	}
	return map[string]any{"id": id, "half_seen": "", "lost": 0, "packet": packet, "steps": steps}
}

func compareObjects(t *testing.T, kernel []NFTRun, objects []map[string]any, cause string) error {
	t.Helper()
	var b strings.Builder
	for _, o := range objects {
		if err := json.NewEncoder(&b).Encode(o); err != nil {
			t.Fatal(err)
		}
	}
	tool, err := ParseNFT(strings.NewReader(b.String()), "h")
	if err != nil {
		t.Fatal(err)
	}
	return CompareNFT(kernel, tool, cause)
}

// A comparison that cannot fail proves nothing: every field of every line in turn is
// made wrong, and steps and packets go, come twice and change places.
func TestCompareNFTFindsPlantedErrors(t *testing.T) {
	kernel, objects := twoPackets(t)
	if err := compareObjects(t, kernel, objects, ""); err != nil {
		t.Fatalf("the same: %v", err)
	}
	planted := 0
	check := func(format string, args ...any) {
		t.Helper()
		planted++
		if err := compareObjects(t, kernel, objects, ""); err == nil {
			t.Errorf("not found: "+format, args...)
		}
	}
	wrong := func(m map[string]any, where string, keys ...string) {
		for _, k := range keys {
			was := m[k]
			switch v := was.(type) {
			case string:
				m[k] = v + "x"
			case int:
				m[k] = v + 1
			case uint64:
				m[k] = v + 1
			case bool:
				m[k] = !v
			default:
				t.Fatalf("%s: %s is a %T", where, k, was)
			}
			check("%s, %s %v", where, k, m[k])
			m[k] = was
		}
	}
	for i, o := range objects {
		steps := o["steps"].([]any)
		wrong(o, fmt.Sprintf("packet %d", i), "half_seen", "lost")
		for n := 4; n < len(steps); n++ {
			step := steps[n].(map[string]any)
			table := step["table"].(map[string]any)
			where := fmt.Sprintf("packet %d, step %d", i, n)
			wrong(step, where, "family", "hook", "verdict", "netns_name", "kind")
			wrong(step["in"].(map[string]any), where, "index")
			wrong(step["out"].(map[string]any), where, "index")
			wrong(table, where, "name", "engine", "family", "base_chain", "compat", "unresolved")
			wrong(table["before"].(map[string]any), where, "family", "length", "src", "dst", "proto", "sport", "dport")
			rules := table["rules"].([]any)
			for r := range rules {
				at := fmt.Sprintf("%s, rule %d", where, r)
				wrong(rules[r].(map[string]any), at, "trace", "chain", "type", "number", "handle", "is_policy", "is_end", "action", "depth")
				table["rules"] = slices.Delete(slices.Clone(rules), r, r+1)
				check("%s is gone", at)
				table["rules"] = slices.Insert(slices.Clone(rules), r, rules[r])
				check("%s is there twice", at)
				table["rules"] = rules
				if r > 0 {
					rules[r-1], rules[r] = rules[r], rules[r-1]
					check("%s before the one before", at)
					rules[r-1], rules[r] = rules[r], rules[r-1]
				}
			}
			o["steps"] = slices.Delete(slices.Clone(steps), n, n+1)
			check("%s is gone", where)
			o["steps"] = slices.Insert(slices.Clone(steps), n, steps[n])
			check("%s is there twice", where)
			o["steps"] = steps
			if n > 4 {
				steps[n-1], steps[n] = steps[n], steps[n-1]
				check("%s before the one before", where)
				steps[n-1], steps[n] = steps[n], steps[n-1]
			}
		}
	}
	all := objects
	for i := range all {
		objects = slices.Delete(slices.Clone(all), i, i+1)
		check("packet %d is gone", i)
		objects = slices.Insert(slices.Clone(all), i, all[i])
		check("packet %d is there twice", i)
	}
	objects = []map[string]any{nftObjectOf(1, slices.Concat(kernel[:2], kernel[2:4])), all[2]}
	check("two packets in one")
	objects = []map[string]any{nftObjectOf(1, kernel[:1]), nftObjectOf(2, kernel[1:3]), nftObjectOf(3, kernel[3:4]), all[2]}
	check("the end of one packet and the beginning of the next in one")
	objects = nil
	check("nothing")
	if planted < 250 {
		t.Errorf("only %d errors planted", planted)
	}
}

func TestCompareNFTActions(t *testing.T) {
	for _, tt := range []struct {
		kernel, tool string
		same         bool
	}{
		{"DROP", "DROP", true}, {"DROP", "REJECT", true}, {"DROP", "reject", true}, {"DROP", "drop", false}, {"DROP", "ACCEPT", false},
		{"DROP", "DNAT", false}, {"ACCEPT", "DNAT", true}, {"ACCEPT", "snat", true}, {"ACCEPT", "MASQUERADE", true}, {"ACCEPT", "redirect", true},
		{"ACCEPT", "accept", false}, {"ACCEPT", "REJECT", false}, {"ACCEPT", "continue", false}, {"QUEUE", "QUEUE", true}, {"QUEUE", "ACCEPT", false},
	} {
		kernel, err := testRuleset().Runs(messages(t, "inet", "t", 1, 1, true, "fwd 5 "+tt.kernel))
		if err != nil {
			t.Fatal(err)
		}
		o := nftObjectOf(1, kernel)
		o["steps"].([]any)[4].(map[string]any)["table"].(map[string]any)["rules"].([]any)[0].(map[string]any)["action"] = tt.tool
		if err := compareObjects(t, kernel, []map[string]any{o}, ""); (err == nil) != tt.same {
			t.Errorf("kernel %s, tool %s: %v", tt.kernel, tt.tool, err)
		}
	}
}

func TestCompareNFTUnresolved(t *testing.T) {
	const cause = "the ruleset changed"
	kernel, objects := twoPackets(t)
	if err := compareObjects(t, kernel, objects, cause); err == nil {
		t.Error("no run is unresolved, and that was not found")
	}
	table := objects[1]["steps"].([]any)[5].(map[string]any)["table"].(map[string]any)
	table["unresolved"], table["rules"] = "because "+cause, nil
	if err := compareObjects(t, kernel, objects, cause); err != nil {
		t.Error(err)
	}
	if err := compareObjects(t, kernel, objects, "another"); err == nil {
		t.Error("unresolved for another cause, and that was not found")
	}
	objects[0]["steps"].([]any)[5].(map[string]any)["verdict"] = "ACCEPT"
	if err := compareObjects(t, kernel, objects, cause); err == nil {
		t.Error("a wrong verdict beside an unresolved run was not found")
	}
}

// Two packets, one after the other in the same memory, look alike at a hook and not at the next:
// whichever nftrace tells of first.
func TestCompareNFTOrder(t *testing.T) {
	run := func(hook string, rule int) NFTRun {
		return NFTRun{
			Family: "ip", Table: "t", Chain: hook, PF: "ip", Hook: hook, Verdict: "ACCEPT",
			Packet: NFTPacket{Key: "a packet", Identity: "1"},
			Rules:  []NFTRule{{Chain: hook, Type: "rule", Number: rule}},
		}
	}
	kernel := []NFTRun{run("pre", 1), run("fwd", 1), run("pre", 1), run("fwd", 2)}
	first := NFTJourney{ID: 1, Runs: []NFTRun{kernel[0], kernel[1]}}
	second := NFTJourney{ID: 2, Runs: []NFTRun{kernel[2], kernel[3]}}
	for _, tool := range [][]NFTJourney{{first, second}, {second, first}} {
		if err := CompareNFT(kernel, tool, ""); err != nil {
			t.Errorf("packet %d first: %v", tool[0].ID, err)
		}
	}
	slices.Reverse(second.Runs)
	if err := CompareNFT(kernel, []NFTJourney{first, second}, ""); err == nil {
		t.Error("the second one's hooks in the wrong order were not found")
	}
	other := slices.Clone(kernel)
	other[3].Packet.Identity = "2"
	slices.Reverse(second.Runs)
	if err := CompareNFT(other, []NFTJourney{first, second}, ""); err == nil {
		t.Error("a journey of two packets was not found")
	}
}
