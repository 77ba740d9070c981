// Demo shows nftrace at work: a host with Docker's rules, two containers and an
// outside, packets between them, and what nftrace says of each.
//
//	demo [-kernel NAME] [-vm]
//
// It runs on this machine if root may trace here, in namespaces that nobody else
// sees and that end with it, and in a VM otherwise. nftrace and traffic are taken
// from the directory that demo is in.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/nftrace/nftrace/testenv"
	"github.com/nftrace/nftrace/testenv/topo"
)

// guestDir is where the VM has what is built here.
const guestDir = "/usr/local/bin"

func init() {
	// QEMU, or the demo in its own namespaces, is to die with the thread that
	// started it, so this one must last.
	runtime.LockOSThread()
}

func main() {
	if testenv.IsGuestInit() {
		testenv.GuestInit()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	kernel := fs.String("kernel", testenv.KernelNames()[0], "the VM's kernel: "+strings.Join(testenv.KernelNames(), ", "))
	inVM := fs.Bool("vm", false, "run in a VM in any case")
	inside := fs.Bool("inside", false, "run the scenes here and now (for demo itself)")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *inside {
		return scenes(ctx, stdout)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Dir(self)
	why := errors.New("as -vm asks")
	if !*inVM {
		why = canTrace(ctx, dir)
	}
	if why == nil {
		fmt.Fprintln(stdout, "demo: on this machine, in network namespaces of its own (its kernel lets root trace)")
		return onHost(ctx, self, stdout, stderr)
	}
	fmt.Fprintf(stdout, "demo: in a VM with Debian's kernel %s (not on this machine: %v)\n", *kernel, why)
	vm := &testenv.VM{Stdout: stdout, Stderr: stderr, Log: stderr, Args: []string{filepath.Join(guestDir, "demo"), "-inside"}}
	for _, name := range []string{"demo", "nftrace", "traffic"} {
		vm.Put = append(vm.Put, testenv.Copy{Host: filepath.Join(dir, name), Guest: filepath.Join(guestDir, name)})
	}
	if vm.Kernel, err = testenv.FindKernel(ctx, *kernel, stderr); err != nil {
		return err
	}
	if vm.Initramfs, err = testenv.Initramfs(ctx, vm.Kernel, stderr); err != nil {
		return err
	}
	res, err := vm.Run(ctx)
	switch {
	case err != nil:
		return err
	case res.Warning != "":
		return fmt.Errorf("the guest's kernel warned:\n%s", res.Warning)
	case res.Status != 0:
		return errors.New("failed in the VM")
	}
	return nil
}

// canTrace says why the demo cannot run on this machine; nil if it can.
func canTrace(ctx context.Context, dir string) error {
	if os.Geteuid() != 0 {
		return errors.New("tracing needs root")
	}
	// Loading it would make this machine's own bridges ask iptables. Where it is, loaded or built in,
	// it has settings.
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		return errors.New("module br_netfilter is not loaded, and loading it would touch the machine's own bridges")
	}
	for _, program := range []string{"ip", "iptables-legacy-restore", "ping", "modprobe"} {
		if _, err := exec.LookPath(program); err != nil {
			return err
		}
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "nftrace"), "-q", "--duration", "100ms", "vlan 4094").CombinedOutput()
	if err == nil {
		return nil
	}
	if msg := strings.TrimSpace(string(out)); msg != "" {
		return errors.New(msg)
	}
	return fmt.Errorf("nftrace: %w", err)
}

// onHost runs the scenes in mount and network namespaces of their own. They end
// with the process, however that ends.
func onHost(ctx context.Context, self string, stdout, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, self, "-inside")
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Pdeathsig:    syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the scenes: %w", err)
	}
	return nil
}

// a scene is one run of nftrace.
type scene struct {
	title   string
	prepare string   // shell lines, in namespace h
	args    []string // of nftrace
	fails   bool     // the traffic does not get through
	want    []string // parts of what nftrace prints, in this order
}

const published = `iptables-legacy -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
iptables-legacy -A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
`

// As docker network create does it.
const secondNetwork = `ip link add br-other type bridge
ip addr add 172.18.0.1/16 dev br-other
ip link set br-other up
iptables-legacy -I DOCKER-ISOLATION-STAGE-1 -i br-other ! -o br-other -j DOCKER-ISOLATION-STAGE-2
iptables-legacy -I DOCKER-ISOLATION-STAGE-2 -o br-other -j DROP
`

var play = []scene{
	{
		title: "a container pings another one on the same bridge",
		args:  []string{"icmp", "--", "ip", "netns", "exec", "c2", "ping", "-c", "1", "172.17.0.2"},
		want: []string{"filter:FORWARD:rule:6", "delivered", // request
			"nat not consulted", "filter:FORWARD:rule:3", "delivered"}, // reply
	},
	{
		title: "a container asks another one over HTTP (the request and the response)",
		args:  []string{"tcp[tcpflags] & tcp-push != 0", "--", "ip", "netns", "exec", "c2", "traffic", "http-get", "172.17.0.2:80"},
		want: []string{"→ 172.17.0.2:80 [ACK,PSH]", "nat not consulted", "filter:FORWARD:rule:3", "delivered",
			"TCP 172.17.0.2:80 →", "filter:FORWARD:rule:3", "delivered"},
	},
	{
		title:   "the outside connects to a published port, -p 8080:80 (SYN and SYN,ACK)",
		prepare: published,
		args:    []string{"tcp[tcpflags] & tcp-syn != 0", "--", "ip", "netns", "exec", "ext", "traffic", "http-get", "10.211.55.8:8080"},
		want: []string{"nat:DOCKER:rule:2", "10.211.55.8:8080 → 172.17.0.2:80", "filter:DOCKER:rule:1",
			"172.17.0.2:80 → 10.211.55.8:8080", "by the conntrack entry"},
	},
	{
		title:   "a container pings one on another bridge, and gets no answer: why?",
		prepare: secondNetwork,
		args:    []string{"icmp", "--", "ip", "netns", "exec", "c2", "ping", "-c", "1", "-W", "1", "172.18.0.2"},
		fails:   true,
		want:    []string{"⇒ dropped", "by filter:DOCKER-ISOLATION-STAGE-2:rule:1"},
	},
}

// scenes builds the topology and plays the scenes.
func scenes(ctx context.Context, stdout io.Writer) (err error) {
	if os.Getenv("NFTRACE_IN_VM") != "1" {
		// Names of namespaces are files in /run: have a /run of our own.
		if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount /run: %w", err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	os.Setenv("PATH", filepath.Dir(self)+":"+os.Getenv("PATH"))
	top, err := topo.Up(ctx, "docker")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, top.Down(context.WithoutCancel(ctx))) }()
	server, err := serve(ctx, "c1", "http-serve", "-n", "2", "-timeout", "5m", ":80")
	if err != nil {
		return err
	}
	defer server.Wait()
	defer server.Process.Kill()

	fmt.Fprint(stdout, `demo: namespace h is a host with Docker's iptables rules, c1 (172.17.0.2) and c2 (172.17.0.3)
demo: are containers on its bridge docker0, ext (10.211.55.1) is outside
`)
	for i, s := range play {
		if err := s.play(ctx, i+1, stdout); err != nil {
			return err
		}
	}
	return nil
}

// serve starts a server in a namespace, and returns once it listens.
func serve(ctx context.Context, ns string, args ...string) (*exec.Cmd, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	args = append([]string{"netns", "exec", ns, "traffic", args[0], "-ready", "/dev/fd/3"}, args[1:]...)
	cmd := exec.CommandContext(ctx, "ip", args...)
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	if n, _ := r.Read(make([]byte, 16)); n == 0 {
		return nil, fmt.Errorf("%s: %w", cmd, cmd.Wait())
	}
	return cmd, nil
}

func (s *scene) play(ctx context.Context, number int, stdout io.Writer) error {
	if err := topo.Shell(ctx, "h", s.prepare); err != nil {
		return err
	}
	args := append([]string{"--netns", "h"}, s.args...)
	fmt.Fprintf(stdout, "\n━━ %d. %s\n%s# nftrace %s\n", number, s.title, commented(s.prepare), quoted(args))

	cmd := exec.CommandContext(ctx, "nftrace", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var tree, messages strings.Builder
	cmd.Stdout, cmd.Stderr = io.MultiWriter(stdout, &tree), &messages
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("scene %d: %w\n%s", number, err, messages.String())
	}
	for line := range strings.Lines(messages.String()) {
		// The others are the traffic's.
		if strings.HasPrefix(line, "nftrace: ") {
			fmt.Fprint(stdout, line)
		}
	}
	if failed := strings.Contains(messages.String(), "nftrace: the command ended: "); failed != s.fails {
		return fmt.Errorf("scene %d: the traffic did not go as it should:\n%s", number, messages.String())
	}
	rest := tree.String()
	for _, want := range s.want {
		_, after, ok := strings.Cut(rest, want)
		if !ok {
			return fmt.Errorf("scene %d: nftrace does not print, or not in this order: %s", number, want)
		}
		rest = after
	}
	return nil
}

func commented(lines string) string {
	var b strings.Builder
	for line := range strings.Lines(lines) {
		b.WriteString("# " + line)
	}
	return b.String()
}

// quoted is a command line as one would type it.
func quoted(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		if words[i] = a; strings.ContainsAny(a, " $&|;()[]*?<>'\"\\") {
			words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}
