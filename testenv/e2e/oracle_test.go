package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/testenv/oracle"
	"github.com/nftrace/nftrace/testenv/rulegen"
	"github.com/nftrace/nftrace/testenv/topo"
)

func needVM(t *testing.T) {
	t.Helper()
	if os.Getenv("NFTRACE_IN_VM") != "1" {
		t.Skip("needs a VM: make test-e2e")
	}
}

// up builds a topology until the test ends.
func up(t *testing.T, name string) {
	t.Helper()
	top, err := topo.Up(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// The oracle is of use only if it has every packet: no limit of rate, no line
// lost, IPv4 and IPv6.
func TestOracleIsComplete(t *testing.T) {
	needVM(t)
	up(t, "lo")
	for _, p := range []string{"iptables-legacy", "ip6tables-legacy"} {
		if err := topo.Load(t.Context(), "h", p, "*raw\nCOMMIT\n"); err != nil {
			t.Fatal(err)
		}
	}
	o, err := oracle.Start(t.Context(), "h")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close(context.Background())
	const n = 499 // below netdev_max_backlog
	for _, to := range []string{"127.0.0.1:9", "[::1]:9"} {
		shell(t.Context(), t, t.TempDir(), "run", nil, fmt.Sprintf("on h traffic udp-send -n %d -size 1 %s\n", n, to))
	}
	// What was sent may still be on its way to the receiver: until a while brings no more.
	lines, udp := []string(nil), 0
	for before := -1; udp != before; {
		before, udp = udp, 0
		shell(t.Context(), t, t.TempDir(), "a while", nil, "on h ping -q -c 2 -i 0.2 127.0.0.1\n")
		if lines, err = o.Lines(); err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			if strings.Contains(l, " PROTO=UDP ") {
				udp++
			}
		}
	}
	for _, src := range []string{"SRC=127.0.0.1", "SRC=0000:0000:0000:0000:0000:0000:0000:0001"} {
		for _, rule := range []string{"raw:OUTPUT:policy:1", "raw:PREROUTING:policy:1"} {
			got := 0
			for _, l := range lines {
				if strings.HasPrefix(l, "TRACE: "+rule+" ") && strings.Contains(l, src) && strings.Contains(l, "PROTO=UDP ") && !strings.Contains(l, "PROTO=ICMP") {
					got++
				}
			}
			if got != n {
				t.Errorf("%s, %s: %d lines for %d packets", src, rule, got, n)
			}
		}
	}
}

// The rules under test must count the same with the oracle and without.
func TestOracleChangesNothing(t *testing.T) {
	needVM(t)
	var saved [2]string
	for i := range saved {
		t.Run(map[int]string{0: "without", 1: "with"}[i], func(t *testing.T) {
			up(t, "docker")
			if i == 1 {
				o, err := oracle.Start(t.Context(), "h")
				if err != nil {
					t.Fatal(err)
				}
				defer o.Close(context.Background())
			}
			shell(t.Context(), t, t.TempDir(), "run", nil, `
serve c1 traffic udp-echo -n 7 :7
on c2 traffic udp-send -n 7 -reply 172.17.0.2:7
on c2 ping -q -c 2 -i 0.2 10.211.55.1
on c2 traffic frag -n 2 10.211.55.1:9
on h ping -q -c 2 -i 0.2 172.17.0.2
`)
			out, err := exec.CommandContext(t.Context(), "ip", "netns", "exec", "h", "iptables-legacy-save", "-c").Output()
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(out)) {
				if !strings.HasPrefix(line, "#") { // the time
					saved[i] += line
				}
			}
		})
	}
	if !strings.Contains(saved[0], "FORWARD DROP [0:0]") || strings.Contains(saved[0], "[0:0] -A FORWARD -j DOCKER-USER") {
		t.Errorf("the traffic did not meet the rules:\n%s", saved[0])
	}
	if saved[0] != saved[1] {
		t.Errorf("without the oracle:\n%s\nwith it:\n%s", saved[0], saved[1])
	}
}

// An overrun of the kernel's log must not pass for a quiet network.
func TestOracleOverrun(t *testing.T) {
	needVM(t)
	up(t, "lo")
	o, err := oracle.Start(t.Context(), "h")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close(context.Background())
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer kmsg.Close()
	line := []byte("<7>" + strings.Repeat("x", 900) + "\n")
	for range 20 << 20 / len(line) { // the VM's log has 16 MiB
		if _, err := kmsg.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.Lines(); err == nil || !strings.Contains(err.Error(), "overrun") {
		t.Errorf("the log has overrun and the oracle says %v", err)
	}
}

// What rulegen makes must load, on every kernel.
func TestRandomRulesLoad(t *testing.T) {
	needVM(t)
	for _, o := range []rulegen.Options{{}, {IPv6: true}, {Lossless: true, Rules: 60}, {IPv6: true, Rules: 60}} {
		program := "iptables-legacy-restore"
		if o.IPv6 {
			program = "ip6tables-legacy-restore"
		}
		for seed := range uint64(7) {
			rules := rulegen.Generate(1000+seed, o)
			cmd := exec.CommandContext(t.Context(), "unshare", "-n", program)
			cmd.Stdin = strings.NewReader(rules)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("seed %d, %+v: %v: %s\n%s", 1000+seed, o, err, out, rules)
			}
		}
	}
	for seed := range uint64(13) {
		rules := rulegen.NFT(1000 + seed)
		cmd := exec.CommandContext(t.Context(), "unshare", "-n", "nft", "-c", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("nft, seed %d: %v: %s\n%s", 1000+seed, err, out, rules)
		}
	}
}

// The kernel's messages of a small ruleset, one by one: what differs between kernels (how
// returns and the ends of chains are told) is no matter of the runs made of them.
func TestOracleNFT(t *testing.T) {
	needVM(t)
	up(t, "bare")
	if err := topo.Load(t.Context(), "h", "nft", `
table inet t {
	chain a {
		udp sport 12345 drop
		counter
		jump b
		return
	}
	chain b {
		counter
	}
	chain g {
		counter
	}
	chain in {
		type filter hook input priority 5; policy drop;
		udp dport 54321 jump a
		udp dport 54321 goto g
		accept
	}
	chain early {
		type filter hook input priority -5; policy accept;
	}
}
`); err != nil {
		t.Fatal(err)
	}
	o, err := oracle.StartNFT(t.Context(), "h")
	if err != nil {
		t.Fatal(err)
	}
	const n = 7
	shell(t.Context(), t, t.TempDir(), "run", nil, fmt.Sprintf("on c2 traffic udp-send -n %d 172.17.0.1:54321\n", n))
	events, err := o.Events()
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if o.Packets() < n {
		t.Errorf("%d packets, want %d", o.Packets(), n)
	}
	// The kernel sends multicast reports when it likes.
	events = slices.DeleteFunc(events, func(e oracle.NFTEvent) bool { return e.PF == unix.NFPROTO_IPV6 })
	// A packet's messages: chain, number of the rule, type, verdict's code.
	want := []string{
		"early 0 end -1", "early 0 policy 0",
		"in 1 rule -3", "a 2 rule -1", "a 3 rule -3", "b 1 rule -1", "b 0 end -1", "a 4 return -5",
		"in 2 rule -4", "g 1 rule -1", "g 0 end -1", "in 0 policy 0",
	}
	if len(events) != n*len(want) {
		t.Errorf("%d messages, want %d", len(events), n*len(want))
	}
	for i, e := range events {
		number, kind := o.Ruleset.Number(e), map[uint32]string{1: "policy", 2: "return", 3: "rule"}[e.Type]
		w := want[i%len(want)]
		if e.Handle == 0 && e.Type != 1 {
			kind = "end" // a return on 6.1, a rule on 6.12
		} else if e.Code == unix.NFT_RETURN {
			kind = "return" // the same
		}
		if got := fmt.Sprintf("%s %d %s %d", e.Chain, number, kind, e.Code); got != w {
			t.Fatalf("message %d is %s, want %s: %+v", i, got, w, e)
		}
	}
	runs, err := o.Ruleset.Runs(events)
	if err != nil {
		t.Fatal(err)
	}
	if len(runs) != 2*n {
		t.Fatalf("%d runs, want %d", len(runs), 2*n)
	}
	lines := []string{
		"inet:t:early:policy:1 ACCEPT 0",
		"inet:t:in:rule:1 jump a 0", "inet:t:a:rule:2 continue 1", "inet:t:a:rule:3 jump b 1", "inet:t:b:rule:1 continue 2",
		"inet:t:b:return:2 RETURN 2", "inet:t:a:rule:4 RETURN 1",
		"inet:t:in:rule:2 goto g 0", "inet:t:g:rule:1 continue 1", "inet:t:g:return:2 RETURN 1", "inet:t:in:policy:4 DROP 0",
	}
	for i := 0; i < len(runs); i += 2 {
		var got []string
		for _, l := range append(runs[i].Rules, runs[i+1].Rules...) {
			got = append(got, fmt.Sprintf("%s %s %d", l.Trace, l.Action, l.Depth))
		}
		if !slices.Equal(got, lines) {
			t.Errorf("packet %d:\n%s\nwant\n%s", i/2, strings.Join(got, "\n"), strings.Join(lines, "\n"))
		}
		for _, r := range runs[i : i+2] {
			want := fmt.Sprintf("ip 172.17.0.3 > 172.17.0.1, %d bytes, protocol 17, ports ", 20+8+64+i/2)
			if !strings.HasPrefix(r.Packet.Key, want) || !strings.HasSuffix(r.Packet.Key, " > 54321") || r.Hook != "INPUT" || r.PF != "ip" || r.In == 0 || r.Out != 0 {
				t.Errorf("packet %d: %+v", i/2, r)
			}
		}
	}
}

// Messages that are lost must not pass for a quiet network.
func TestOracleNFTOverrun(t *testing.T) {
	needVM(t)
	up(t, "lo")
	rules, err := expand("table ip t { chain out { type filter hook output priority 0;\n@499 counter\n}\n}\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := topo.Load(t.Context(), "h", "nft", rules); err != nil {
		t.Fatal(err)
	}
	o, err := oracle.StartNFT(t.Context(), "h")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close(context.Background())
	shell(t.Context(), t, t.TempDir(), "run", nil, "on h traffic udp-send -n 499 -size 1 127.0.0.1:9\n")
	if _, err := o.Events(); err == nil || !strings.Contains(err.Error(), "overrun") {
		t.Errorf("the buffer has overrun and the oracle says %v", err)
	}
}
