// Vm runs a command in a virtual machine with a kernel of Debian's.
//
//	vm [flags] -- command [argument…]
//
// The command runs as root in a guest that has nothing of the host but what
// -put names. Its output comes as it is written; its exit status is vm's own,
// 128+N if signal N ended it. 124 says that the guest did not end in time, and
// 125 that vm or the guest failed: it did not boot, its kernel panicked.
//
// The same binary is the guest's init.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/nftrace/nftrace/testenv"
)

const (
	statusTimeout = 124
	statusFailed  = 125
)

func init() {
	// QEMU is to die with the thread that started it, so this one must last.
	runtime.LockOSThread()
}

func main() {
	if testenv.IsGuestInit() {
		testenv.GuestInit()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// copies is a flag that may be given more than once: FROM:TO.
type copies struct {
	list      *[]testenv.Copy
	fromGuest bool
}

func (c copies) String() string { return "" }

func (c copies) Set(s string) error {
	from, to, ok := strings.Cut(s, ":")
	if !ok || from == "" || to == "" {
		return errors.New("want FROM:TO")
	}
	if c.fromGuest {
		*c.list = append(*c.list, testenv.Copy{Guest: from, Host: to})
	} else {
		*c.list = append(*c.list, testenv.Copy{Host: from, Guest: to})
	}
	return nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	vm := &testenv.VM{Stdout: stdout, Stderr: stderr, Log: stderr}
	fs := flag.NewFlagSet("vm", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintln(stderr, "usage: vm [flags] -- command [argument...]\n\nRuns a command in a VM. Flags:")
		fs.PrintDefaults()
	}
	kernel := fs.String("kernel", "6.12", "the kernel: "+strings.Join(testenv.KernelNames(), ", "))
	fs.IntVar(&vm.CPUs, "smp", 1, "number of processors")
	fs.IntVar(&vm.MemoryMiB, "mem", 1024, "memory in MiB")
	fs.StringVar(&vm.Append, "append", "", "add to the kernel's command line")
	fs.BoolVar(&vm.CountInstructions, "icount", false, "make a nanosecond of guest time one instruction")
	fs.BoolVar(&vm.KVM, "kvm", false, "use KVM instead of emulation")
	fs.DurationVar(&vm.Timeout, "timeout", 10*time.Minute, "give up after this time")
	fs.StringVar(&vm.Dir, "dir", "", "working directory in the guest")
	fs.Var(copies{&vm.Put, false}, "put", "`HOST:GUEST` file or directory to put into the guest (repeatable)")
	fs.Var(copies{&vm.Get, true}, "get", "`GUEST:HOST` file or directory to bring back (repeatable)")
	fs.Func("env", "`KEY=VALUE` for the command's environment (repeatable)", func(s string) error {
		vm.Env = append(vm.Env, s)
		return nil
	})
	verbose := fs.Bool("v", false, "show the kernel's console and the times")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return statusFailed
	}
	vm.Args = fs.Args()
	if len(vm.Args) == 0 {
		fs.Usage()
		return statusFailed
	}
	if *verbose {
		vm.Console = stderr
	}
	res, err := start(ctx, vm, *kernel)
	if res != nil && *verbose {
		fmt.Fprintf(stderr, "vm: %s: command started after %.2fs, all done after %.2fs\n",
			vm.Kernel.Release, res.Boot.Seconds(), res.Total.Seconds())
	}
	if res != nil && res.Warning != "" {
		fmt.Fprintf(stderr, "vm: the guest's kernel warned:\n%s\n", res.Warning)
	}
	if err != nil {
		fmt.Fprintf(stderr, "vm: kernel %s: %v\n", *kernel, err)
		switch {
		case errors.Is(err, testenv.ErrTimeout):
			return statusTimeout
		case res != nil && res.Status != 0:
			return res.Status
		}
		return statusFailed
	}
	if res.Signal != 0 {
		fmt.Fprintf(stderr, "vm: the command was ended by signal %d (%v)\n", int(res.Signal), res.Signal)
	}
	return res.Status
}

func start(ctx context.Context, vm *testenv.VM, kernel string) (*testenv.Result, error) {
	var err error
	if vm.Kernel, err = testenv.FindKernel(ctx, kernel, vm.Log); err != nil {
		return nil, err
	}
	if vm.Initramfs, err = testenv.Initramfs(ctx, vm.Kernel, vm.Log); err != nil {
		return nil, err
	}
	return vm.Run(ctx)
}
