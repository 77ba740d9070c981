package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nftrace/nftrace/testenv/topo"
)

// patience is how long anything may take in a VM that is emulated: attaching all kprobes with two
// CPUs took 103 s on a slow machine.
const patience = 5 * time.Minute

// eventually polls until ok, and fails the test if that takes too long.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// lockedBuffer may be read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// A process is nftrace, or something beside it, until the test ends.
type process struct {
	t              *testing.T
	cmd            *exec.Cmd
	stdout, stderr lockedBuffer
	ended          chan struct{}
	ready          string
}

// spawn starts a command; if it is to be in a namespace, through ip netns exec, which
// becomes the command.
func spawn(t *testing.T, ns string, change func(*exec.Cmd), args ...string) *process {
	t.Helper()
	if ns != "" {
		args = append([]string{"ip", "netns", "exec", ns}, args...)
	}
	p := &process{t: t, cmd: exec.Command(args[0], args[1:]...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.WaitDelay = patience
	if change != nil {
		change(p.cmd)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.cmd.Wait() // ProcessState has what matters
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// attached starts nftrace and returns once it is attached.
func attached(t *testing.T, ns string, change func(*exec.Cmd), args ...string) *process {
	t.Helper()
	ready := filepath.Join(t.TempDir(), "ready")
	p := spawn(t, ns, change, append([]string{"nftrace", "--ready-file", ready}, args...)...)
	p.ready = ready
	p.waitReady()
	return p
}

func (p *process) waitReady() {
	p.t.Helper()
	eventually(p.t, "attaching", func() bool {
		select {
		case <-p.ended:
			p.t.Fatalf("%s ended: %s", p.cmd, p.stderr.String())
		default:
		}
		_, err := os.Stat(p.ready)
		return err == nil
	})
}

// status waits for the end and returns the exit status, -1 for a signal.
func (p *process) status() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("%s does not end; stderr: %s", p.cmd, p.stderr.String())
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// want checks the exit status, that stderr says all of lines, and that each of its
// lines is nftrace's own.
func (p *process) want(status int, lines ...string) {
	p.t.Helper()
	got := p.status()
	stderr := p.stderr.String()
	if got != status {
		p.t.Errorf("%s: status %d, want %d; stderr: %s", p.cmd, got, status, stderr)
	}
	for _, w := range lines {
		if !strings.Contains(stderr, w) {
			p.t.Errorf("%s: does not say %q, but: %s", p.cmd, w, stderr)
		}
	}
	for l := range strings.Lines(stderr) {
		if !strings.HasPrefix(l, "nftrace: ") || strings.ContainsAny(l, "\x1b\t\r") {
			p.t.Errorf("%s: a line of stderr: %q", p.cmd, l)
		}
	}
}

var cliSummary = regexp.MustCompile(`^nftrace: (\d+) packets, (\d+) records, (\d+) lost( \(.*\))?, (\d+) unresolved$`)

// summary checks that the last line is the summary, with nothing lost or unresolved,
// and returns the number of packets.
func (p *process) summary() int {
	p.t.Helper()
	p.status()
	lines := strings.Split(strings.TrimSpace(p.stderr.String()), "\n")
	m := cliSummary.FindStringSubmatch(lines[len(lines)-1])
	if m == nil {
		p.t.Fatalf("%s: the last line is no summary: %s", p.cmd, p.stderr.String())
	}
	if m[3] != "0" || m[5] != "0" {
		p.t.Errorf("%s: %s\n%s", p.cmd, m[0], p.unresolved())
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

// unresolved returns those lines of the output, be it JSON or text, that tell of a table why
// its rules are not known.
func (p *process) unresolved() string {
	out := p.stdout.String()
	if i := slices.Index(p.cmd.Args, "-o"); i >= 0 {
		out = read(p.t, p.cmd.Args[i+1])
	}
	var lines []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, `"unresolved":"`) && strings.Count(line, `"unresolved":"`) != strings.Count(line, `"unresolved":""`) ||
			strings.Contains(line, "unresolved:") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// objects reads the JSON lines; the last may be cut off if that is allowed.
func objects(t *testing.T, data string, cut bool) []map[string]any {
	t.Helper()
	var list []map[string]any
	lines := strings.SplitAfter(data, "\n")
	for i, l := range lines {
		if l == "" {
			continue
		}
		var o map[string]any
		err := json.Unmarshal([]byte(l), &o)
		switch {
		case err == nil && strings.HasSuffix(l, "\n"):
			list = append(list, o)
		case cut && i == len(lines)-1:
		default:
			t.Errorf("line %d of the output is no JSON: %v: %.200q", i+1, err, l)
		}
	}
	return list
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

func needNftrace(t *testing.T) {
	t.Helper()
	needVM(t)
	if _, err := exec.LookPath("nftrace"); err != nil {
		t.Fatal(err)
	}
}

func sh(t *testing.T, lines string) {
	t.Helper()
	if err := command("sh", "-e", "-c", lines); err != nil {
		t.Fatal(err)
	}
}

// pingAll returns when all answers have come. ping does not: it waits for the last one as
// long as the slowest of the others took twice, which is too short where a CPU stands still
// for a while (it is emulated).
func pingAll(t *testing.T, ns string, n int, addr string) {
	t.Helper()
	want := echoReplies(t, ns) + n
	sh(t, fmt.Sprintf("ip netns exec %s ping -q -i 0.01 -c %d %s", ns, n, addr))
	eventually(t, "the answers to all pings", func() bool { return echoReplies(t, ns) >= want })
}

// echoReplies is how many answers to pings a namespace has received over IPv4.
func echoReplies(t *testing.T, ns string) int {
	t.Helper()
	out, err := exec.Command("ip", "netns", "exec", ns, "cat", "/proc/net/snmp").Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if f[0] != "Icmp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		n, err := strconv.Atoi(f[slices.Index(names, "InEchoReps")])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Fatal("/proc/net/snmp does not count ICMP")
	return 0
}

func command(args ...string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// The probes keep what tables a hook has: a packet must meet those that there are when it
// comes, however they changed since the last one.
// In a PID namespace, as in a container without --pid=host, a process has another number than
// the probes see.
func TestInPIDNamespace(t *testing.T) {
	needNftrace(t)
	up(t, "lo")
	sh(t, "ip netns exec h iptables-legacy -A OUTPUT -p icmp -j ACCEPT")
	p := spawn(t, "h", nil, "unshare", "--pid", "--fork", "--mount-proc",
		"nftrace", "--format", "json", "icmp[icmptype] == 8", "--", "sh", "-c", "ping -q -c 3 -i 0.01 127.0.0.1 >/dev/null")
	p.want(0)
	if n := p.summary(); n != 3 || strings.Count(p.stdout.String(), `"-p icmp -j ACCEPT"`) != n {
		t.Errorf("%d packets:\n%s", n, p.stdout.String())
	}
}

func TestRulesetChanges(t *testing.T) {
	needNftrace(t)
	up(t, "lo")
	shell := func(line string) {
		t.Helper()
		if err := topo.Shell(t.Context(), "h", line); err != nil {
			t.Fatal(err)
		}
	}
	shell("iptables-legacy -A OUTPUT -p icmp -j ACCEPT")
	p := attached(t, "h", nil, "--format", "trace", "icmp[icmptype] == 8")
	met := regexp.MustCompile(`TRACE: (\w+:OUTPUT:\w+:\d+) .* LEN=(\d+) `)
	for i, step := range []struct {
		change string
		want   []string
	}{
		{":", []string{"filter:OUTPUT:rule:1"}},
		{":", []string{"filter:OUTPUT:rule:1"}},
		{"iptables-legacy -I OUTPUT -p tcp -j ACCEPT", []string{"filter:OUTPUT:rule:2"}},
		{"iptables-legacy -t raw -A OUTPUT -p icmp -j ACCEPT", []string{"raw:OUTPUT:rule:1", "filter:OUTPUT:rule:2"}},
		{"iptables-legacy -t raw -F", []string{"raw:OUTPUT:policy:1", "filter:OUTPUT:rule:2"}},
		{"modprobe -r iptable_raw", []string{"filter:OUTPUT:rule:2"}},
		{"iptables-legacy -t raw -A OUTPUT -p icmp -j ACCEPT", []string{"raw:OUTPUT:rule:1", "filter:OUTPUT:rule:2"}},
		{"iptables-legacy -Z", []string{"raw:OUTPUT:rule:1", "filter:OUTPUT:rule:2"}},
	} {
		size := 100 + i
		shell(step.change)
		shell(fmt.Sprintf("ping -q -c 1 -W 5 -s %d 127.0.0.1", size))
		var got []string
		eventually(t, fmt.Sprintf("packet %d", i), func() bool {
			got = nil
			for _, m := range met.FindAllStringSubmatch(p.stdout.String(), -1) {
				if m[2] == strconv.Itoa(size+28) {
					got = append(got, m[1])
				}
			}
			return len(got) >= len(step.want)
		})
		if !slices.Equal(got, step.want) {
			t.Errorf("packet %d, after %q, met %q, want %q", i, step.change, got, step.want)
		}
	}
	p.signal(syscall.SIGINT)
	p.want(0)
	p.summary()
}

func TestBadInput(t *testing.T) {
	needNftrace(t)
	up(t, "lo")
	tmp := t.TempDir()
	out := filepath.Join(tmp, "out")
	ro := filepath.Join(tmp, "ro")
	sh(t, fmt.Sprintf("mkdir %s; mount -t tmpfs -o ro none %s", ro, ro))
	t.Cleanup(func() { sh(t, "umount "+ro) })
	nobody := func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	for _, tt := range []struct {
		name   string
		args   string
		change func(*exec.Cmd)
		status int
		want   string
	}{
		{"unknown flag", "nftrace --nosuch", nil, 2, "unknown flag: --nosuch"},
		{"bad filter", "nftrace icmp and", nil, 2, "filter: "},
		{"no command", "nftrace icmp --", nil, 2, "no command behind --"},
		{"no interface", "nftrace -o OUT -i nosuch0", nil, 1, `interface "nosuch0" does not exist in this network namespace; ip link lists`},
		{"no interface there", "nftrace -o OUT --netns h -i nosuch0", nil, 1, `interface "nosuch0" does not exist in namespace h`},
		{"every interface", "nftrace -o OUT -i any", nil, 1, "without -i, packets of every interface are traced"},
		{"few files", "sh -c 'ulimit -n 40; exec nftrace -o OUT icmp'", nil, 1, "no more than 40 files may be open at once, and nftrace needs 256; raise the limit (ulimit -n 1024)"},
		{"very few files", "sh -c 'ulimit -n 20; exec nftrace -o OUT icmp'", nil, 1, "raise the limit (ulimit -n 1024)"},
		{"no sysfs", "unshare -m sh -c 'umount -l /sys && exec nftrace -o OUT icmp'", nil, 1, "mount it (mount -t sysfs sysfs /sys)"},
		{"no procfs", "unshare -m sh -c 'umount -l /proc && exec nftrace -o OUT icmp'", nil, 1, "nftrace: /proc/self is missing, for there is no procfs here; mount it (mount -t proc proc /proc)"},
		{"no engine", "nftrace -o OUT --container web", nil, 1, "--container web: no container engine answers"},
		{"no namespace", "nftrace -o OUT --netns nosuch", nil, 1, "--netns nosuch: no such network namespace"},
		{"no process", "nftrace -o OUT --netns pid:99999", nil, 1, "no process 99999"},
		{"no namespace's file", "nftrace -o OUT --netns /etc/passwd", nil, 1, "/etc/passwd is not a network namespace"},
		{"not root", "nftrace icmp", nobody, 1, "must be run as root"},
		{"no BTF", "unshare -m sh -c 'mount -t tmpfs none /sys/kernel/btf && exec nftrace -o OUT icmp'", nil, 1, "CONFIG_DEBUG_INFO_BTF=y"},
		{"no directory", "nftrace -o TMP/nosuch/out", nil, 1, "the directory TMP/nosuch does not exist"},
		{"a directory", "nftrace -o TMP", nil, 1, "is a directory"},
		{"read-only", "nftrace -o TMP/ro/out", nil, 1, "-o TMP/ro/out: the file system is read-only: choose another place"},
		{"no ready file", "nftrace -o OUT --ready-file TMP/nosuch/r", nil, 1, "the directory TMP/nosuch does not exist"},
		{"read-only ready file", "nftrace --ready-file TMP/ro/r", nil, 1, "--ready-file TMP/ro/r: the file system is read-only"},
		{"command not found", "nftrace -o OUT -- nosuch-command", nil, 1, `command "nosuch-command" is not in PATH`},
		{"no program", "nftrace -o OUT -- /etc/passwd", nil, 1, `command "/etc/passwd" cannot be run: permission denied`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fill := strings.NewReplacer("OUT", out, "TMP", tmp)
			p := spawn(t, "", tt.change, "sh", "-c", "exec "+fill.Replace(tt.args))
			p.want(tt.status, fill.Replace(tt.want))
			if n := strings.Count(p.stderr.String(), "\n"); n != 1 {
				t.Errorf("%d lines: %s", n, p.stderr.String())
			}
			if p.stdout.String() != "" {
				t.Errorf("on stdout: %s", p.stdout.String())
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("the output file was made")
			}
		})
	}
}

// TestLockdown needs a kernel booted with lockdown=confidentiality: make test-e2e-lockdown.
func TestLockdown(t *testing.T) {
	needNftrace(t)
	if !strings.Contains(read(t, "/sys/kernel/security/lockdown"), "[confidentiality]") {
		if strings.Contains(read(t, "/proc/cmdline"), "lockdown=confidentiality") {
			t.Fatal("booted with lockdown, and not locked down")
		}
		t.Skip("the kernel is not locked down: make test-e2e-lockdown")
	}
	out := filepath.Join(t.TempDir(), "out")
	p := spawn(t, "", nil, "nftrace", "-o", out, "icmp")
	p.want(1, "nftrace: the kernel is locked down (confidentiality), which forbids tracing; boot without lockdown=confidentiality\n")
	if n := strings.Count(p.stderr.String(), "\n"); n != 1 {
		t.Errorf("%d lines: %s", n, p.stderr.String())
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("the output file was made")
	}
}

// Whatever the kernel has, nftrace says how it is probed, and in one line why it cannot be as
// was asked.
func TestBackend(t *testing.T) {
	needNftrace(t)
	release := strings.TrimSpace(read(t, "/proc/sys/kernel/osrelease"))
	const lacks = "type information of modules (in Linux 5.11 and newer), " +
		"atomic operations that return the old value (in Linux 5.12 and newer), BPF programs of type syscall (in Linux 5.14 and newer), " +
		"bpf_kallsyms_lookup_name (in Linux 5.16 and newer), bpf_loop (in Linux 5.17 and newer)\n"
	old := strings.HasPrefix(release, "5.10.")
	trace := func(args ...string) *process {
		return spawn(t, "", nil, append(append([]string{"nftrace", "-v"}, args...), "icmp", "--", "sh", "-c", "ping -q -c 3 -i 0.01 127.0.0.1 >/dev/null")...)
	}
	seen := "nftrace: 6 packets, "
	auto := trace()
	auto.want(0, seen)
	if got := strings.Contains(auto.stderr.String(), "nftrace: all probes are kprobes, for the kernel lacks "+lacks); got != old {
		t.Errorf("kernel %s: %s", release, auto.stderr.String())
	}
	trace("--backend", "kprobe").want(0, seen)
	// Before Linux 5.11 what all nftraces of a user have in memory is held against the limit.
	spawn(t, "", nil, "sh", "-c", "ulimit -S -l 0; exec nftrace icmp -- sh -c 'ping -q -c 3 -i 0.01 127.0.0.1 >/dev/null'").want(0, seen)
	if !old {
		trace("--backend", "fentry").want(0, seen)
		return
	}
	out := filepath.Join(t.TempDir(), "out")
	p := spawn(t, "", nil, "nftrace", "--backend", "fentry", "-o", out, "icmp")
	p.want(1, "nftrace: kernel "+release+" lacks what fentry probes need: "+lacks)
	if n := strings.Count(p.stderr.String(), "\n"); n != 1 {
		t.Errorf("%d lines: %s", n, p.stderr.String())
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("the output file was made")
	}
}

// withoutFunction is nftrace in a mount namespace of its own where the type information of a module, or
// of the kernel (vmlinux), has no function of some name.
func withoutFunction(t *testing.T, module, function string, args ...string) *process {
	t.Helper()
	path := "/sys/kernel/btf/" + module
	if builtInKernel(t) {
		path = "/sys/kernel/btf/vmlinux" // has those of all
	}
	types := strings.Replace(read(t, path), "\x00"+function+"\x00", "\x00"+strings.Repeat("x", len(function))+"\x00", 1)
	file := filepath.Join(t.TempDir(), "types")
	if err := os.WriteFile(file, []byte(types), 0o644); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("mount --bind %s %s && exec nftrace \"$@\"", file, path)
	return spawn(t, "", nil, append([]string{"unshare", "-m", "sh", "-c", script, "sh"}, args...)...)
}

// Where a function takes no fentry probe, it is probed by a kprobe: with its module, or, of the
// kernel's own, with all others.
func TestRefusedFentry(t *testing.T) {
	needNftrace(t)
	if strings.HasPrefix(read(t, "/proc/sys/kernel/osrelease"), "5.10.") {
		t.Skip("kprobes only")
	}
	up(t, "docker")
	for _, c := range []struct{ module, function, probes string }{
		{"bridge", "__br_forward", "nftrace: all probes are fentry probes, but for kprobes at __br_forward, since the kernel lacks places for fentry probes in __br_forward\n"},
		{"vmlinux", "skb_morph", "nftrace: all probes are kprobes, for the kernel lacks places for fentry probes in skb_morph\n"},
	} {
		t.Run(c.function, func(t *testing.T) {
			ping := []string{"icmp", "--", "sh", "-c", "ip netns exec c2 ping -q -c 3 -i 0.01 172.17.0.2 >/dev/null"}
			p := withoutFunction(t, c.module, c.function, append([]string{"-v"}, ping...)...)
			p.want(0, c.probes, "nftrace: 6 packets, ")
			p.summary()
			if n := strings.Count(p.stdout.String(), "  bridge  to port vethc"); n != 6 {
				t.Errorf("%d packets at a bridge's port, want 6:\n%s", n, p.stdout.String())
			}
			withoutFunction(t, c.module, c.function, append([]string{"--backend", "fentry"}, ping...)...).want(1)
		})
	}
}

// In a boot with modules that have no type information (NFTRACE_NO_BTF), what they do is told all
// the same, and how they are probed; what cannot be told without is said.
func TestModulesWithoutBTF(t *testing.T) {
	needNftrace(t)
	modules := os.Getenv("NFTRACE_NO_BTF")
	if modules == "" {
		t.Skip("all modules have type information: make test-e2e-no-btf")
	}
	up(t, "docker")
	if _, err := os.Stat("/sys/kernel/btf/x_tables"); err == nil {
		t.Fatal("module x_tables has type information")
	}
	const (
		why     = "module x_tables has no type information (/sys/kernel/btf/x_tables is missing)"
		kprobes = "kprobes at xt_find_table_lock, xt_free_table_info, xt_replace_table, since " + why
	)
	ping := []string{"icmp", "--", "sh", "-c", "ip netns exec c2 ping -q -c 3 -i 0.01 172.17.0.2 >/dev/null"}
	p := spawn(t, "", nil, append([]string{"nftrace", "-v"}, ping...)...)
	p.want(0, "nftrace: all probes are fentry probes, but for "+kprobes, "nftrace: 6 packets, ")
	p.summary()
	if n := strings.Count(p.stdout.String(), "-j DOCKER-USER"); n != 6 {
		t.Errorf("%d packets in DOCKER-USER, want 6:\n%s", n, p.stdout.String())
	}
	out := filepath.Join(t.TempDir(), "out")
	p = spawn(t, "", nil, append([]string{"nftrace", "--backend", "fentry", "-o", out}, ping...)...)
	p.want(1, "nftrace: "+why+", which fentry probes need; leave out --backend fentry, or load a module that has it\n")
	if n := strings.Count(p.stderr.String(), "\n"); n != 1 {
		t.Errorf("%d lines: %s", n, p.stderr.String())
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("the output file was made")
	}
	if modules != "all" {
		return
	}
	if err := topo.Shell(t.Context(), "h", "modprobe nf_tables"); err != nil {
		t.Fatal(err)
	}
	spawn(t, "", nil, append([]string{"nftrace"}, ping...)...).want(0,
		"nf_tables is not traced: module nf_tables has no type information (/sys/kernel/btf/nf_tables is missing); load a module that has it",
		"nftrace: 6 packets, ")
}

// engine is as much of Docker as nftrace asks: one container.
func engine(t *testing.T, name string, pid int) (dockerHost string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/containers/" + name + "/json":
			fmt.Fprintf(w, `{"Id":"4ab3","Name":"/%s","State":{"Running":true,"Pid":%d},"HostConfig":{"NetworkMode":"bridge"}}`, name, pid)
		case "/containers/stopped/json":
			fmt.Fprint(w, `{"Id":"4ab4","Name":"/stopped","State":{"Running":false,"Pid":0},"HostConfig":{"NetworkMode":"bridge"}}`)
		case "/containers/json":
			fmt.Fprint(w, `[{"Id":"`+name+`"}]`)
		default:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"message":"No such container"}`)
		}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return "unix://" + socket
}

// inside starts a process in a namespace that stays there, and returns its number.
func inside(t *testing.T, ns string) int {
	t.Helper()
	stdin, hold, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); hold.Close() })
	p := spawn(t, ns, func(c *exec.Cmd) { c.Stdin = stdin }, "cat")
	pid := p.cmd.Process.Pid
	eventually(t, "a process in "+ns, func() bool { return read(t, fmt.Sprintf("/proc/%d/comm", pid)) == "cat\n" })
	return pid
}

// TestPlaces runs one nftrace for each way to name places, all at once, around the same
// traffic.
func TestPlaces(t *testing.T) {
	needNftrace(t)
	up(t, "docker")
	for _, ns := range []string{"c1", "c2", "ext"} { // or they would have no hooks to be seen at
		if err := topo.Load(t.Context(), ns, "iptables-legacy", "*filter\nCOMMIT\n"); err != nil {
			t.Fatal(err)
		}
	}
	pid := inside(t, "c1")
	docker := engine(t, "web", pid)
	env := func(c *exec.Cmd) { c.Env = append(os.Environ(), "DOCKER_HOST="+docker) }

	tests := []struct {
		args string
		want int
		p    *process
	}{
		{args: "", want: 30},
		{args: "-i docker0", want: 6},
		{args: "-i docker0 -i eth0", want: 16},
		{args: "-i lo", want: 14},
		{args: "--netns c1", want: 6},
		{args: "--netns /run/netns/c1", want: 6},
		{args: fmt.Sprintf("--netns pid:%d", pid), want: 6},
		{args: "--netns c1 --netns ext", want: 16},
		{args: "--netns ext -i eth0", want: 10},
		{args: "--netns ext -i lo", want: 0},
		{args: "--netns c1 --netns ext -i eth0", want: 16},
		{args: "--container web", want: 6},
		{args: "--container c2", want: 6}, // no such container, but a namespace
	}
	// The kernel lets a function have 38 probes at most, of which an nftrace may take 10.
	for batch := range slices.Chunk(tests, 3) {
		for i := range batch {
			ready := filepath.Join(t.TempDir(), "ready")
			args := append([]string{"nftrace", "--ready-file", ready, "--format", "json"}, strings.Fields(batch[i].args)...)
			batch[i].p = spawn(t, "h", env, append(args, "icmp")...)
			batch[i].p.ready = ready
		}
		for i := range batch {
			batch[i].p.waitReady()
		}
		pingAll(t, "c1", 3, "172.17.0.3")   // on docker0: 6 packets
		pingAll(t, "ext", 5, "10.211.55.8") // on eth0: 10
		pingAll(t, "h", 7, "127.0.0.1")     // on lo of the host: 14
		for i := range batch {
			batch[i].p.signal(syscall.SIGINT)
		}
		for _, tt := range batch {
			t.Run("nftrace "+tt.args, func(t *testing.T) {
				tt.p.t = t
				tt.p.want(0)
				if n := tt.p.summary(); n != tt.want {
					t.Errorf("the summary says %d packets, want %d", n, tt.want)
				}
				if n := len(objects(t, tt.p.stdout.String(), false)); n != tt.want {
					t.Errorf("%d packets, want %d", n, tt.want)
				}
			})
		}
	}

	for arg, want := range map[string]string{
		"nosuch":  `--container nosuch: no such container: "nosuch"; docker ps`,
		"stopped": "--container stopped: the container is not running: start stopped first",
	} {
		p := spawn(t, "h", env, "nftrace", "--container", arg)
		p.want(1, want)
	}
}

// An interface that goes away and comes back has another index: nftrace says once that it is not seen.
func TestInterfaceGone(t *testing.T) {
	needNftrace(t)
	up(t, "lo")
	const add = "ip -n h link add gone0 type veth peer name gone1\n"
	sh(t, add)
	p := attached(t, "h", nil, "-i", "gone0", "-i", "lo", "icmp")
	sh(t, "ip -n h link del gone0\n"+add)
	const gone = `nftrace: interface "gone0" in this network namespace is gone; packets of another one by that name are not shown, start nftrace anew for it`
	eventually(t, "nftrace says so", func() bool { return strings.Contains(p.stderr.String(), gone) })
	pingAll(t, "h", 7, "127.0.0.1")
	p.signal(syscall.SIGINT)
	p.want(0, gone)
	if n := strings.Count(p.stderr.String(), "gone0"); n != 1 {
		t.Errorf("%d times: %s", n, p.stderr.String())
	}
	if n := p.summary(); n != 14 {
		t.Errorf("%d packets on lo, want 14", n)
	}
}

// pings keeps a namespace's loopback busy until the test ends.
func pings(t *testing.T, ns string, args ...string) *process {
	t.Helper()
	return spawn(t, ns, nil, append([]string{"ping", "-q", "-i", "0.02"}, args...)...)
}

// piped starts nftrace in namespace h with its standard output in a pipe, and returns the end to read from.
func piped(t *testing.T, args ...string) (*process, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	p := attached(t, "h", func(c *exec.Cmd) { c.Stdout = w }, args...)
	w.Close()
	return p, r
}

// diedBy checks that a process that has ended was ended by a signal.
func diedBy(t *testing.T, p *process, sig syscall.Signal) {
	t.Helper()
	if s := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != sig {
		t.Errorf("ended with %v: %s", p.cmd.ProcessState, p.stderr.String())
	}
}

func TestEnds(t *testing.T) {
	needNftrace(t)
	up(t, "docker")
	t.Run("count", func(t *testing.T) {
		p := spawn(t, "h", nil, "nftrace", "-c", "7", "--format", "json", "icmp", "--", "ping", "-q", "-i", "0.01", "127.0.0.1")
		if s := p.status(); s != 0 { // ping without -c ended, too
			t.Errorf("status %d", s)
		}
		if n := len(objects(t, p.stdout.String(), false)); n != 7 || p.summary() != 7 {
			t.Errorf("%d packets: %s", n, p.stderr.String())
		}
	})
	t.Run("duration", func(t *testing.T) {
		start := time.Now()
		p := attached(t, "h", nil, "--duration", "300ms", "--format", "json", "icmp")
		p.want(0)
		if n := p.summary(); n != 0 || time.Since(start) < 300*time.Millisecond {
			t.Errorf("%d packets, after %v", n, time.Since(start))
		}
	})
	t.Run("command", func(t *testing.T) {
		p := spawn(t, "h", nil, "nftrace", "--format", "json", "icmp", "--", "sh", "-c", "ping -q -c 5 -i 0.01 127.0.0.1 >/dev/null; exit 3")
		p.want(0, "nftrace: the command ended: exit status 3\n")
		if n := len(objects(t, p.stdout.String(), false)); n != 10 || p.summary() != 10 {
			t.Errorf("%d packets: %s", n, p.stderr.String())
		}
	})
	t.Run("command takes signals", func(t *testing.T) {
		p := spawn(t, "h", nil, "nftrace", "--", "grep", "SigIgn", "/proc/self/status")
		if s := p.status(); s != 0 || !strings.Contains(p.stderr.String(), "SigIgn:\t0000000000000000\n") {
			t.Errorf("status %d: %s", s, p.stderr.String())
		}
	})
	t.Run("standard output is closed", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "out")
		const ping = " -- ping -q -c 5 -i 0.01 127.0.0.1 >&- 2>"
		const nowhere = "nftrace: standard output is closed, or /dev/null: no packet is written; redirect it (> FILE), or give -o FILE\n"
		for flags, want := range map[string]string{"": nowhere, "-o " + out: ""} {
			said := filepath.Join(t.TempDir(), "said")
			spawn(t, "h", nil, "sh", "-c", "exec nftrace "+flags+" icmp"+ping+said).want(0)
			got := read(t, said)
			if strings.HasPrefix(got, nowhere) != (want != "") || !strings.Contains(got, "\nnftrace: 10 packets, ") {
				t.Errorf("nftrace %s: %s", flags, got)
			}
		}
		if n := strings.Count(read(t, out), "⇒"); n != 10 {
			t.Errorf("%d packets in the file", n)
		}
		p := spawn(t, "h", nil, "sh", "-c", "exec nftrace icmp 1</dev/null")
		p.want(1, "nftrace: standard output is open for reading only: redirect it (> FILE), or give -o FILE\n")
	})
	t.Run("reader stands still", func(t *testing.T) {
		p, _ := piped(t, "--format", "trace", "icmp")
		pingAll(t, "h", 307, "127.0.0.1") // more than a pipe holds
		eventually(t, "the end, by a signal", func() bool {
			p.cmd.Process.Signal(syscall.SIGINT)
			select {
			case <-p.ended:
				return true
			default:
				return false
			}
		})
		diedBy(t, p, syscall.SIGINT)
	})
	t.Run("reader stands still, and nftrace says so", func(t *testing.T) {
		p, r := piped(t, "--format", "trace", "icmp")
		pingAll(t, "h", 307, "127.0.0.1")
		p.signal(syscall.SIGINT)
		eventually(t, "nftrace says that it writes still", func() bool {
			return strings.Contains(p.stderr.String(), "nftrace: still writing the packets that were seen, as fast as they are read; interrupt again to end at once and lose them\n")
		})
		p.signal(syscall.SIGINT)
		p.status()
		diedBy(t, p, syscall.SIGINT)
		m := regexp.MustCompile(`\nnftrace: (\d+) packets, \d+ records, \d+ lost \((\d+ packets: not written when interrupted again, )?\d+ records: not read when interrupted again\), 0 unresolved\n$`).
			FindStringSubmatch(p.stderr.String())
		if m == nil {
			t.Fatalf("the last line is no summary: %s", p.stderr.String())
		}
		out, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(out), " filter:INPUT:"); strconv.Itoa(n) != m[1] || !bytes.HasSuffix(out, []byte("\n")) {
			t.Errorf("%d packets were written; %s", n, p.stderr.String())
		}
	})
	t.Run("quiet", func(t *testing.T) {
		p := spawn(t, "h", nil, "nftrace", "-q", "--", "true")
		if p.want(0); p.stderr.String() != "" {
			t.Errorf("-q says %s", p.stderr.String())
		}
	})
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "out")
			p := attached(t, "h", nil, "--format", "json", "-o", out, "icmp")
			pings(t, "h", "127.0.0.1")
			eventually(t, "packets", func() bool { return strings.Count(read(t, out), "\n") >= 3 })
			p.signal(sig)
			p.want(0)
			if n, m := len(objects(t, read(t, out), false)), p.summary(); n != m {
				t.Errorf("%d packets in the file, %d in the summary", n, m)
			}
		})
	}
	// Packets that are under way when nftrace ends are seen to their end.
	t.Run("in the midst of packets", func(t *testing.T) {
		pings(t, "h", "-i", "0.004", "127.0.0.1")
		for range 5 {
			out := filepath.Join(t.TempDir(), "out")
			p := attached(t, "h", nil, "--format", "trace", "-o", out, "icmp")
			eventually(t, "packets", func() bool { return strings.Count(read(t, out), "filter:INPUT:") >= 11 })
			p.signal(syscall.SIGINT)
			p.want(0)
			n := p.summary()
			for _, hook := range []string{"OUTPUT", "INPUT"} {
				if m := strings.Count(read(t, out), " filter:"+hook+":"); m != n {
					t.Errorf("%d packets, %d of them at %s", n, m, hook)
				}
			}
		}
	})
	gone := func(pid string) bool {
		state, err := os.ReadFile("/proc/" + strings.TrimSpace(pid) + "/stat")
		return err != nil || bytes.Contains(state, []byte(") Z "))
	}
	// A command ends with nftrace, and what a shell runs with it.
	for name, command := range map[string]string{"command": "%s", "shell": "sh -c '%s'; true"} {
		t.Run("signal with a "+name, func(t *testing.T) {
			pidFile := filepath.Join(t.TempDir(), "pid")
			sleeps := fmt.Sprintf("echo $$ > %[1]s.new; mv %[1]s.new %[1]s; exec sleep 1000", pidFile)
			p := spawn(t, "h", nil, "nftrace", "--", "sh", "-c", fmt.Sprintf(command, sleeps))
			eventually(t, "the command", func() bool { return read(t, pidFile) != "" })
			p.signal(syscall.SIGINT)
			p.want(0)
			eventually(t, "the end of what the command runs", func() bool { return gone(read(t, pidFile)) })
		})
	}
	// A daemon that a command has started goes on.
	t.Run("command leaves a daemon", func(t *testing.T) {
		pidFile := filepath.Join(t.TempDir(), "pid")
		spawn(t, "h", nil, "nftrace", "--", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $! > "+pidFile).want(0)
		pid := strings.TrimSpace(read(t, pidFile))
		t.Cleanup(func() { sh(t, "kill "+pid) })
		if gone(pid) {
			t.Error("it has ended")
		}
	})
	for _, more := range []bool{true, false} {
		t.Run(fmt.Sprintf("reader goes away, more packets %v", more), func(t *testing.T) {
			p, r := piped(t, "icmp")
			ping := pings(t, "h", map[bool][]string{true: {"127.0.0.1"}, false: {"-c", "1", "127.0.0.1"}}[more]...)
			if !more {
				ping.status()
			}
			line := make([]byte, 1)
			if _, err := io.ReadFull(r, line); err != nil {
				t.Fatal(err)
			}
			r.Close()
			p.want(0, "the reader of the output went away; stopping")
			p.summary()
		})
	}
	t.Run("full disk", func(t *testing.T) {
		dir := t.TempDir()
		sh(t, "mount -t tmpfs -o size=64k none "+dir)
		t.Cleanup(func() { sh(t, "umount "+dir) })
		out := filepath.Join(dir, "out")
		p := attached(t, "h", nil, "--format", "json", "-o", out, "icmp")
		pings(t, "h", "127.0.0.1")
		p.want(1, "nftrace: write to "+out+": no space left on device; the packets written before are kept\n")
		said := p.summary()
		if n := len(objects(t, read(t, out), false)); n < 3 || n != said {
			t.Errorf("%d packets are in the file, and %d are said to be", n, said)
		}
	})
	t.Run("interface goes away", func(t *testing.T) {
		sh(t, "ip -n h link add d0 type dummy; ip -n h addr add 192.0.2.1/24 dev d0; ip -n h link set d0 up")
		p := attached(t, "h", nil, "--format", "json", "-i", "d0", "-i", "lo", "icmp or udp")
		sh(t, "ip netns exec h traffic udp-send -n 5 192.0.2.9:9")
		sh(t, "ip -n h link del d0")
		pingAll(t, "h", 2, "127.0.0.1")
		p.signal(syscall.SIGINT)
		p.want(0)
		if n := len(objects(t, p.stdout.String(), false)); n != 9 || p.summary() != 9 {
			t.Errorf("%d packets: %s\n%s", n, p.stderr.String(), p.stdout.String())
		}
	})
	t.Run("namespace goes away", func(t *testing.T) {
		sh(t, "ip netns add gone; ip -n gone link set lo up; ip netns exec gone iptables-legacy -A OUTPUT -p icmp -j ACCEPT")
		p := attached(t, "h", nil, "--format", "json", "--netns", "gone", "--netns", "h", "icmp")
		pingAll(t, "gone", 5, "127.0.0.1")
		sh(t, "ip netns del gone")
		pingAll(t, "h", 2, "127.0.0.1")
		p.signal(syscall.SIGINT)
		p.want(0)
		if n := len(objects(t, p.stdout.String(), false)); n != 14 || p.summary() != 14 {
			t.Errorf("%d packets: %s", n, p.stderr.String())
		}
	})
}

// On a kernel whose netfilter is all built in (make kernel-builtin) nftrace waits for nothing, and
// what comes to be later is traced.
func TestBuiltIn(t *testing.T) {
	needNftrace(t)
	if !builtInKernel(t) {
		t.Skip("netfilter is modules here: make test-builtin")
	}
	for _, m := range []string{"x_tables", "nf_tables", "bridge", "nf_conntrack"} {
		if strings.Contains(read(t, "/proc/modules"), m+" ") {
			t.Fatalf("%s is a module", m)
		}
	}
	up(t, "lo")
	p := attached(t, "h", nil, "-v", "--format", "trace", "icmp")
	const legacy = `iptables-legacy -A OUTPUT -p icmp -m comment --comment legacy -j ACCEPT
ip6tables-legacy -A OUTPUT -p icmpv6 -j ACCEPT
`
	const load = legacy + countNFT + countBridged + "ping -q -c 1 -W 0.1 10.9.0.2 || true # nobody answers\n"
	if err := topo.Shell(t.Context(), "h", load); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"TRACE: filter:OUTPUT:rule:1 ", "TRACE: inet:t:out:rule:1 ", "TRACE: eb:filter:OUTPUT:rule:1 "} {
		eventually(t, want, func() bool { return strings.Contains(p.stdout.String(), want) })
	}
	p.signal(syscall.SIGINT)
	p.want(0, "nftrace: attached in ", "nftrace: all probes are ")
	p.summary()
	for _, wrong := range []string{"waiting for modules", "no rulesets on this system yet", "was loaded", "not traced"} {
		if strings.Contains(p.stderr.String(), wrong) {
			t.Errorf("%q: %s", wrong, p.stderr.String())
		}
	}
}

// builtInKernel tells whether netfilter is no modules.
func builtInKernel(t *testing.T) bool {
	return strings.HasSuffix(strings.TrimSpace(read(t, "/proc/sys/kernel/osrelease")), "-builtin")
}
