package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/testenv/topo"
)

// movingSysctls are the files below /proc/sys that change by themselves.
var movingSysctls = []struct{ pattern, why string }{
	{`^kernel/random/`, "random numbers, and how many bits there are"},
	{`^kernel/ns_last_pid$`, "the last process number given out"},
	{`^kernel/pty/nr$`, "pseudo-terminals in use"},
	{`^kernel/sched_domain/`, "costs that the scheduler measures"},
	{`^kernel/perf_event_max_sample_rate$`, "the kernel lowers it where interrupts take long"},
	{`^kernel/perf_cpu_time_max_percent$`, "goes with the one above"},
	{`^kernel/usermodehelper/`, "capability sets, printed per reader"},
	{`^fs/(dentry-state|file-nr|inode-nr|inode-state|aio-nr)$`, "counts of objects in use"},
	{`^net/netfilter/nf_conntrack_count$`, "connections that are tracked now"},
	{`^net/ipv[46]/conf/.*/stable_secret$`, "not readable until it is set"},
}

var movingSysctl = func() *regexp.Regexp {
	var all []string
	for _, m := range movingSysctls {
		all = append(all, m.pattern)
	}
	return regexp.MustCompile(strings.Join(all, "|"))
}()

// A state is what nftrace must leave as it is: what was asked → the answer.
type state map[string]string

var (
	saveCounters = regexp.MustCompile(` \[\d+:\d+\]`)
	saveTimes    = regexp.MustCompile(`(?m)^#.*\n`)
	// Times that run down, and the use of routes and neighbours.
	ipMoving = regexp.MustCompile(`\b(valid_lft|preferred_lft|expires|used|age|users|\w+_timer) +\S+`)
)

// see takes down the system's state. Files that begin with skip are the test's own.
func see(t *testing.T, namespaces []string, skip string) state {
	t.Helper()
	s := state{}
	output := func(ns string, args ...string) string {
		if ns != "" {
			args = append([]string{"ip", "netns", "exec", ns}, args...)
		}
		out, err := exec.Command(args[0], args[1:]...).Output()
		if err != nil {
			t.Fatalf("%s: %v", strings.Join(args, " "), err)
		}
		return string(out)
	}
	for _, ns := range append([]string{""}, namespaces...) {
		in := "in namespace " + ns + ": "
		if ns == "" {
			in = ""
		}
		for _, p := range []string{"iptables-legacy-save", "ip6tables-legacy-save"} {
			out := output(ns, p)
			s[in+p] = saveTimes.ReplaceAllString(saveCounters.ReplaceAllString(out, ""), "")
		}
		if ns == "h" && hasEbtables() { // elsewhere, asking would make them
			for _, table := range []string{"broute", "nat", "filter"} {
				s[in+"ebtables "+table] = output(ns, "ebtables-legacy", "-t", table, "-L", "--Ln")
			}
		}
		s[in+"nft list ruleset"] = output(ns, "nft", "-a", "-s", "list", "ruleset")
		for _, f := range []string{"/proc/net/ip_tables_names", "/proc/net/ip6_tables_names", "/proc/net/arp_tables_names"} {
			s[in+f] = output(ns, "sh", "-c", "cat "+f+" || echo not there")
		}
		for _, a := range []string{"link", "address", "route show table all", "-6 route show table all", "rule", "-6 rule"} {
			out := output(ns, append([]string{"ip", "-details"}, strings.Fields(a)...)...)
			s[in+"ip "+a] = ipMoving.ReplaceAllString(out, "")
		}
		dir := "/proc/sys/net"
		if ns == "" {
			dir = "/proc/sys"
		}
		// Some of the files cannot be read, and grep says so with its status.
		cmd := exec.Command("grep", "-rs", "", dir)
		if ns != "" {
			cmd = exec.Command("ip", "netns", "exec", ns, "grep", "-rs", "", dir)
		}
		out, _ := cmd.Output()
		n := 0
		for l := range strings.Lines(string(out)) {
			name, value, _ := strings.Cut(strings.TrimPrefix(l, "/proc/sys/"), ":")
			if !movingSysctl.MatchString(name) {
				s[in+"sysctl "+name] += value
				n++
			}
		}
		if n < 100 {
			t.Fatalf("%sonly %d sysctls can be read", in, n)
		}
	}
	s["/proc/modules"] = read(t, "/proc/modules")
	params, err := filepath.Glob("/sys/module/*/parameters/*")
	if err != nil || len(params) < 20 {
		t.Fatalf("%d parameters of modules, %v", len(params), err)
	}
	for _, f := range params {
		if strings.HasPrefix(f, "/sys/module/damon_stat/") {
			continue // what the kernel measures of memory, all the time
		}
		data, err := os.ReadFile(f) // some can only be written
		s["parameter "+f] = fmt.Sprint(string(data), err)
	}
	var files, processes []string
	for _, root := range []string{"/sys/fs/bpf", "/run", "/tmp", "/var", "/dev", "/root", "/etc", "/sys/kernel/tracing/instances"} {
		filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil && !errors.Is(err, os.ErrNotExist):
				t.Fatal(err)
			case err != nil:
				return nil
			case strings.HasPrefix(path, skip):
				return fs.SkipDir
			}
			files = append(files, path)
			return nil
		})
	}
	s["files"] = strings.Join(files, "\n")
	s["probes of tracefs"] = read(t, "/sys/kernel/tracing/kprobe_events") + read(t, "/sys/kernel/tracing/uprobe_events")
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range comms {
		// Threads of the kernel come and go; nftrace and what it starts are listed.
		if exe, err := os.Readlink(filepath.Join(filepath.Dir(f), "exe")); err == nil {
			processes = append(processes, exe)
		}
	}
	sort.Strings(processes)
	s["processes"] = strings.Join(processes, "\n")
	s["the kernel's log"] = kernelLog(t)
	s["bpf objects"] = bpfObjects(t)
	return s
}

// The kernel logs these of clocks that are late, as an emulated machine's are when the
// host is busy.
var clockLog = regexp.MustCompile(`(?m)^<\d>\[[^]]*\] (clocksource: |hrtimer: interrupt took|perf: interrupt took too long).*\n`)

func kernelLog(t *testing.T) string {
	t.Helper()
	buf := make([]byte, 32<<20)
	n, err := syscall.Klogctl(3 /* SYSLOG_ACTION_READ_ALL */, buf)
	if err != nil {
		t.Fatal(err)
	}
	return clockLog.ReplaceAllString(string(buf[:n]), "")
}

// bpfObjects lists the numbers of all programs, links and maps in the kernel. A number
// is there before the object can be opened, so it is all that is asked for.
func bpfObjects(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, kind := range []struct {
		name string
		cmd  uintptr
	}{
		{"program", unix.BPF_PROG_GET_NEXT_ID}, {"map", unix.BPF_MAP_GET_NEXT_ID}, {"link", unix.BPF_LINK_GET_NEXT_ID},
	} {
		var attr struct{ start, next, flags uint32 }
		for {
			_, _, errno := unix.Syscall(unix.SYS_BPF, kind.cmd, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
			if errno == unix.ENOENT {
				break
			}
			if errno != 0 {
				t.Fatalf("list bpf %ss: %v", kind.name, errno)
			}
			attr.start = attr.next
			fmt.Fprintln(&b, kind.name, attr.next)
		}
	}
	return b.String()
}

// same reports what has changed, but for the keys that may.
func (s state) same(t *testing.T, when string, now state, but ...string) {
	t.Helper()
	keys := map[string]bool{}
	for k := range s {
		keys[k] = true
	}
	for k := range now {
		keys[k] = true
	}
	for k := range keys {
		if s[k] == now[k] || slices.Contains(but, k) {
			continue
		}
		var gone, come []string
		before, after := strings.Split(s[k], "\n"), strings.Split(now[k], "\n")
		for _, l := range before {
			if !slices.Contains(after, l) {
				gone = append(gone, "- "+l)
			}
		}
		for _, l := range after {
			if !slices.Contains(before, l) {
				come = append(come, "+ "+l)
			}
		}
		t.Errorf("%s: %s has changed:\n%s", when, k, strings.Join(append(gone, come...), "\n"))
	}
}

// moduleNames drops the counts of users from /proc/modules.
func moduleNames(modules string) string {
	var names []string
	for l := range strings.Lines(modules) {
		name, _, _ := strings.Cut(l, " ")
		names = append(names, name)
	}
	return strings.Join(names, "\n")
}

// countNetns tells how many network namespaces root has made: the kernel lets it make no more
// than the limit.
func countNetns(t *testing.T) int {
	t.Helper()
	const file = "/proc/sys/user/max_net_namespaces"
	limit := read(t, file)
	defer func() {
		if err := os.WriteFile(file, []byte(limit), 0); err != nil {
			t.Fatal(err)
		}
	}()
	for n := range 1000 {
		if err := os.WriteFile(file, fmt.Append(nil, n), 0); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("true")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if cmd.Run() == nil {
			return n - 1
		}
	}
	t.Fatal("more than 1,000 network namespaces")
	return 0
}

// unchangedNFT are rules of nf_tables beside the legacy ones, which all packets meet.
const unchangedNFT = `
table inet fw {
	set ports { type inet_service; elements = { 22, 80 }; }
	chain forward {
		type filter hook forward priority 0; policy accept;
		tcp dport @ports accept
		counter
	}
}
`

// unchangedEB are rules of ebtables that packets meet, too.
const unchangedEB = `*nat
-A PREROUTING -p IPv4 -j mark --mark-or 0x100 --mark-target CONTINUE
*filter
:U RETURN
-A FORWARD -p IPv6 -j U
-A INPUT -p IPv4 --ip-proto icmp -j ACCEPT
`

// unchangedTraffic is what flows while the state is compared; it ends by itself, in
// case the test does not.
const unchangedTraffic = "while ip netns exec c2 ping -q -c 1 -W 1 10.211.55.1 && ip netns exec c1 ping -q -c 1 -W 1 fd00:17::3; do :; done"

// TestNothingChanges compares the system before, during and after nftrace, and after it
// was killed at any moment.
func TestNothingChanges(t *testing.T) {
	needNftrace(t)
	if hasEbtables() {
		up(t, "docker-ebtables")
		if err := topo.Load(t.Context(), "h", "ebtables-legacy", unchangedEB); err != nil {
			t.Fatal(err)
		}
	} else {
		up(t, "docker")
	}
	if err := topo.Load(t.Context(), "h", "ip6tables-legacy", "*filter\n-A FORWARD -p udp --dport 9 -j DROP\nCOMMIT\n"); err != nil {
		t.Fatal(err)
	}
	if err := topo.Load(t.Context(), "h", "nft", unchangedNFT); err != nil {
		t.Fatal(err)
	}
	if err := topo.Load(t.Context(), "c1", "iptables-nft", "*filter\n-A INPUT -p icmp -j ACCEPT\nCOMMIT\n"); err != nil {
		t.Fatal(err)
	}
	namespaces := []string{"h", "c1", "c2", "ext"}
	tmp := t.TempDir()
	const skip = "/tmp/TestNothingChanges" // where TempDir is
	// The rulesets' reader may take iptables' lock; nftrace must not make it.
	if err := os.Remove("/run/xtables.lock"); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	// The first packets set up what stays: modules that conntrack loads, caches.
	traffic := "ip netns exec c2 ping -q -c 2 -i 0.01 10.211.55.1; ip netns exec c1 ping -q -c 2 -i 0.01 fd00:17::3"
	sh(t, traffic)
	see(t, namespaces, skip) // may set up something itself
	before := see(t, namespaces, skip)
	netns := countNetns(t)

	// Under traffic: other processes run, and count in the log of nothing.
	run := func(t *testing.T, args ...string) *process {
		out := filepath.Join(tmp, "out")
		os.Remove(out)
		p := attached(t, "h", nil, append([]string{"-o", out, "--format", "json"}, args...)...)
		return p
	}
	settled := func(t *testing.T, when string) {
		t.Helper()
		// Programs and their trampolines are freed a moment after their last user.
		eventually(t, when+": no bpf object is left", func() bool { return bpfObjects(t) == before["bpf objects"] })
		eventually(t, when+": no use of a module is left", func() bool { return read(t, "/proc/modules") == before["/proc/modules"] })
		before.same(t, when, see(t, namespaces, skip))
		eventually(t, when+": no network namespace is left", func() bool { return countNetns(t) == netns })
	}

	t.Run("during and after", func(t *testing.T) {
		p := run(t, "icmp or icmp6")
		busy := spawn(t, "", nil, "sh", "-c", unchangedTraffic)
		eventually(t, "packets", func() bool { return strings.Count(read(t, filepath.Join(tmp, "out")), "\n") >= 7 })
		now := see(t, namespaces, skip)
		busy.cmd.Process.Kill()
		busy.status()
		if now["bpf objects"] == before["bpf objects"] {
			t.Error("nftrace has no bpf object: the comparison sees nothing")
		}
		before.same(t, "during", now, "bpf objects", "processes", "/proc/modules")
		if n := countNetns(t); n == netns {
			t.Error("nftrace has no network namespace of its own: the comparison sees nothing")
		}
		if b, n := moduleNames(before["/proc/modules"]), moduleNames(now["/proc/modules"]); b != n {
			t.Errorf("during: the modules were\n%s\nand are\n%s", b, n)
		}
		p.signal(syscall.SIGINT)
		p.want(0)
		p.summary()
		settled(t, "after")
	})
	t.Run("with a command", func(t *testing.T) {
		p := spawn(t, "h", nil, "nftrace", "-q", "icmp", "--", "true")
		p.want(0)
		settled(t, "after")
	})

	// The moments are stages that the kernel shows, so no time is guessed.
	count := func(t *testing.T, kind string) int {
		return strings.Count(bpfObjects(t), kind) - strings.Count(before["bpf objects"], kind)
	}
	for _, tt := range []struct {
		name   string
		moment func(p *process) bool
		busy   bool
	}{
		{"at once", func(*process) bool { return true }, false},
		{"with its first map", func(p *process) bool { return count(p.t, "map") > 0 }, false},
		{"with its first program", func(p *process) bool { return count(p.t, "program") > 0 }, false},
		{"with its fifth program", func(p *process) bool { return count(p.t, "program") >= 5 }, false},
		{"with its first link", func(p *process) bool { return count(p.t, "link") > 0 }, true},
		{"with its fifth link", func(p *process) bool { return count(p.t, "link") >= 5 }, true},
		{"attached", func(p *process) bool { return fileExists(p.ready) }, false},
		{"attached, under traffic", func(*process) bool {
			return strings.Count(read(t, filepath.Join(tmp, "out")), "\n") >= 7
		}, true},
	} {
		t.Run("killed "+tt.name, func(t *testing.T) {
			out := filepath.Join(tmp, "out")
			os.Remove(out)
			ready := filepath.Join(t.TempDir(), "ready")
			var busy *process
			if tt.busy {
				busy = spawn(t, "", nil, "sh", "-c", unchangedTraffic)
			}
			p := spawn(t, "h", nil, "nftrace", "--ready-file", ready, "-o", out, "--format", "json")
			p.ready = ready
			eventually(t, tt.name, func() bool {
				select {
				case <-p.ended:
					t.Fatalf("nftrace ended: %s", p.stderr.String())
				default:
				}
				return tt.moment(p)
			})
			p.signal(syscall.SIGKILL)
			p.status()
			if busy != nil {
				busy.cmd.Process.Kill()
				busy.status()
			}
			objects(t, read(t, out), true)
			settled(t, "after the kill")
		})
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// The one thing that nftrace can change, on a router that chooses next hops by a packet's flow hash: where flows
// move, and there alone, nftrace says that they may.
func TestNextHops(t *testing.T) {
	needNftrace(t)
	const up = `ip netns add sender; ip netns add router
ip -n sender link add eth0 type veth peer name eth0 netns router
ip -n sender addr add 10.1.0.1/24 dev eth0; ip -n sender link set eth0 up; ip -n sender route add default via 10.1.0.2
ip -n router addr add 10.1.0.2/24 dev eth0; ip -n router link set eth0 up
for i in 1 2; do
	ip -n router link add d$i type dummy; ip -n router addr add 10.2.$i.1/24 dev d$i; ip -n router link set d$i up
	ip -n router neigh add 10.2.$i.2 lladdr 02:00:00:00:00:0$i dev d$i nud permanent
done
ip -n router route add 10.9.0.0/16 nexthop via 10.2.1.2 dev d1 nexthop via 10.2.2.2 dev d2
ip netns exec router sysctl -qw net.ipv4.ip_forward=1 net.ipv4.fib_multipath_hash_policy=1
`
	t.Cleanup(func() { sh(t, "ip netns del sender; ip netns del router") })
	sh(t, up)
	const rules = `table ip t {
	set first { type inet_service; flags dynamic; size 997; }
	chain prerouting { type filter hook prerouting priority 0; counter; }
	chain postrouting { type filter hook postrouting priority 0; oifname d1 add @first { udp sport }; }
}
`
	if err := topo.Load(t.Context(), "router", "nft", rules); err != nil {
		t.Fatal(err)
	}
	// flows are those of 97 that take the first next hop.
	flows := func() string {
		t.Helper()
		sh(t, "ip netns exec router nft flush set ip t first; ip netns exec sender traffic raw -proto udp -n 97 10.9.1.1:9")
		list, err := exec.Command("ip", "netns", "exec", "router", "nft", "list", "set", "ip", "t", "first").Output()
		if err != nil {
			t.Fatal(err)
		}
		_, elements, _ := strings.Cut(string(list), "elements = {")
		ports := strings.FieldsFunc(elements, func(r rune) bool { return r < '0' || r > '9' })
		slices.Sort(ports)
		return strings.Join(ports, " ")
	}
	before := flows()
	if n := len(strings.Fields(before)); n < 13 || n > 97-13 {
		t.Fatalf("%d of 97 flows take the first next hop", n)
	}
	p := attached(t, "", nil, "icmp")
	moved := flows() != before
	p.signal(syscall.SIGINT)
	p.want(0)
	const warning = "nftrace: in namespace router fib_multipath_hash_policy is 1: of routes with several next hops, flows that are forwarded may take another one while nftrace runs (README, Limits)\n"
	if said := strings.Contains(p.stderr.String(), warning); said != moved {
		t.Errorf("flows moved: %v; nftrace says %s", moved, p.stderr.String())
	}
	if after := flows(); after != before {
		t.Errorf("flows by the first next hop before nftrace ran: %s\nand since: %s", before, after)
	}
}
